"""All that topd knows of transformers' models: head, hidden states, which of them branch, how tokens are drawn from them."""
