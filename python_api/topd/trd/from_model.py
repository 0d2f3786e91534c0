"""A causal language model of transformers as a generator."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from topd.checks.values import positive_int
from topd.models.sampling import all_end_tokens, bare_settings, eval_mode, generated, left_padded, most_positions, plain_text
from topd.trd.generators import Answer, Answers, Request, Sampling


class FromModel:
    """Answers from a model in this process, in left-padded batches.

    Each answer has its own random numbers, from its request's seed: it does not depend on which others are in its batch (up to
    the rounding of the model's own products), nor on how often the run was stopped. The model's generation_config does not
    matter; model and modes are as before after a batch.

    Args:
        model: a causal language model of transformers with `generate`; on its own device.
        tokenizer: of the model; its chat template unless the run has chat=False.
        batch_size: > 0, prompts a batch.

    Raises:
        TypeError, ValueError: a model without `generate`, a wrong batch_size.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8) -> None:
        if not hasattr(model, "generate"):
            raise TypeError(f"model must have generate, got {type(model).__name__}; pass the causal language model")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = positive_int("batch_size", batch_size)
        self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__

    def answers(self, requests: Iterable[Request]) -> Answers:
        """Answer the requests, a batch at a time."""
        waiting = iter(requests)
        while group := list(islice(waiting, self.batch_size)):
            prompts = [each.prompt.ids(self.tokenizer, chat=each.chat, options=each.options) for each in group]
            fitting = []
            for request, ids in zip(group, prompts, strict=True):
                if reason := self._beyond(len(ids), request.sampling):
                    yield request, Answer(finish_reason=None, status="too_long", reason=reason, attempts=0)
                else:
                    fitting.append((request, ids))
            if fitting:
                chosen = [request for request, _ in fitting]
                yield from zip(chosen, self._batch(chosen, [ids for _, ids in fitting]), strict=True)

    def _beyond(self, prompt: int, sampling: Sampling) -> str:
        """Say why prompt and answer do not fit into the model; return "" where they do."""
        most = most_positions(self.model)
        if most is None or prompt + sampling.max_new_tokens <= most:
            return ""
        return (
            f"the prompt's {prompt:,} tokens and the {sampling.max_new_tokens:,} of max_new_tokens exceed the model's {most:,}"
        )

    @torch.no_grad()
    def _batch(self, requests: list[Request], prompts: list[list[int]]) -> list[Answer]:
        ends, sampling = all_end_tokens(self.model, self.tokenizer), requests[0].sampling
        ids, attended = left_padded(prompts, 0, self.model.device)
        settings = bare_settings(sampling.max_new_tokens, ends, ends[0] if ends else 0, do_sample=False)
        draw = _Draw(sampling, [each.seed for each in requests], self.model.device)
        with eval_mode(self.model):
            new = generated(self.model, ids, attended, settings, draw)
        return [self._answer(row, ends) for row in new.tolist()]

    def _answer(self, tokens: list[int], ends: list[int]) -> Answer:
        stop = next((column for column, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[:stop]
        return Answer(plain_text(self.tokenizer, tokens), "length" if stop is None else "stop", tokens=len(tokens))


class _Draw:
    """A logits processor that leaves one token to each row, drawn with the row's own random numbers; `generate` then takes the
    most likely token."""

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, _input_ids: Tensor, logits: Tensor) -> Tensor:
        temperature, top_p, top_k = self.sampling.temperature, self.sampling.top_p, self.sampling.top_k
        if temperature == 0:
            return logits
        scores, ids = (logits.float() / temperature).topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
        # The Gumbel trick: the largest of log p + noise is a sample of p. Noise belongs to a token, not to its rank.
        rows = [torch.empty_like(logits[0], dtype=torch.float32).exponential_(generator=each) for each in self.generators]
        noise = torch.stack(rows).gather(-1, ids).clamp_min_(torch.finfo(torch.float32).tiny).log_()
        drawn = ids.gather(-1, (scores - noise).argmax(-1, keepdim=True))
        return torch.full_like(logits, -torch.inf).scatter_(-1, drawn, 0.0)
