"""Greedy decoding of a ``transformers`` model: its own ``generate``, or a compiled step and a cache of fixed length.

Without gradients, but not in ``torch.inference_mode``: joined layers (``fusing.py``) need their x's version counter.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .models import quiet


class Eager:
    """``generate`` as ``transformers`` has it.

    Called with (ids, most new tokens, streamer), as ``Compiled`` is; ids is (1, tokens). The streamer gets the prompt
    and then each token, and may be None.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Tensor, max_new_tokens: int, streamer: Any) -> None:
        pad = self.model.generation_config.pad_token_id
        with torch.no_grad(), quiet(lambda done, total: None):
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer,
                do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                pad_token_id=0 if pad is None else pad,
            )  # fmt: skip


class Compiled:
    """The prompt in eager mode, then one token at a time through ``torch.compile`` of the model's forward.

    longest: tokens that the cache holds, prompt and answer; one length, so that the step is compiled once. On a GPU the
    step is a CUDA graph. On a CPU it takes attention written out in matrix products, which the compiler joins with what
    is around them: for one query torch's own attention takes four times as long in bf16 as in fp32 (docs/cpu.md).
    """

    def __init__(self, model: Any, longest: int) -> None:
        from transformers import StaticCache

        self.model, self.longest = model, longest
        self.device = next(model.parameters()).device
        self.cache = StaticCache(config=model.config, max_cache_len=longest)
        ends = model.generation_config.eos_token_id
        self.ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        how: dict[str, Any] = {"mode": "reduce-overhead"}
        if self.device.type == "cpu":  # the layers stay what they are; asking each of them, and for the sizes of each
            # of its tensors, takes more than a millisecond
            guards = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            how = {"options": {"guard_filter_fn": guards, "size_asserts": False}}
        takes = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # as older versions call it
        self.step = torch.compile(model.forward, fullgraph=True, dynamic=False, **how)

    def __call__(self, ids: Tensor, max_new_tokens: int, streamer: Any) -> None:
        if ids.shape[1] + max_new_tokens > self.longest:
            raise ValueError(f"{ids.shape[1]} tokens and {max_new_tokens} new ones; the cache holds {self.longest}")
        attention = self.model.config._attn_implementation
        if self.device.type == "cpu":
            self.model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                self._decode(ids, max_new_tokens, streamer)
        finally:
            self.model.set_attn_implementation(attention)

    def _decode(self, ids: Tensor, max_new_tokens: int, streamer: Any) -> None:
        if streamer is not None:
            streamer.put(ids.cpu())
        self.cache.reset()
        forward, at = self.model, torch.arange(ids.shape[1], device=self.device)
        for _ in range(max_new_tokens):
            cache = {self.cache_name: self.cache}
            out = forward(input_ids=ids, position_ids=at[None], cache_position=at, use_cache=True, **cache)
            ids = out.logits[:, -1:].argmax(-1).clone()
            if streamer is not None:
                streamer.put(ids[0].cpu())
            if int(ids) in self.ends:
                break
            forward, at = self.step, at[-1:] + 1
        if streamer is not None:
            streamer.end()
