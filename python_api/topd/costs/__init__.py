"""What a loss will cost, predicted from shapes: memory, operations of matrix products, and time on a named device."""
