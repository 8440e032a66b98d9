"""lm-evaluation-harness's model class over a model that is already built: prompts are cut where a benchmark says so.

In: a transformers model and its tokenizer. Out: an object that `lm_eval.simple_evaluate` takes. This file needs
lm_eval; `run.py` imports it only after it has said how to install that.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.errors import DataError
from longlora.model.head import mixed_precision

Truncation = Literal["middle", "left"]


def cut(tokens: list[int], limit: int, truncation: Truncation) -> list[int]:
    """At most `limit` >= 1 of `tokens`: the last ones (``left``), or both ends in equal parts (``middle``).

    ``middle`` keeps ``limit // 2`` tokens of each end, so one less where `limit` is odd, as LongBench's own
    pred.py does (THUDM/LongBench).
    """
    if len(tokens) <= limit:
        return tokens
    half = limit // 2
    if truncation == "left" or half == 0:
        return tokens[-limit:]
    return tokens[:half] + tokens[-half:]


class HarnessModel(HFLM):  # type: ignore[misc]
    """`HFLM` that cuts each task's prompts at its own place, counts them, and makes only the logits that are scored.

    lm-eval cuts on the left and says so in a log. Logits of a whole prompt of 32,768 tokens would take 16.8 GB in
    float32 with a vocabulary of 128,256; scored are those of the answer.

    Args:
        max_length: tokens of prompt and answer at most.
        truncation: task name -> where its prompts are cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        truncation: Mapping[str, Truncation],
    ) -> None:
        autocast = mixed_precision(model)
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # HFLM sets its padding token
            backend="causal",
            max_length=max_length,
            batch_size=batch_size,
            softmax_dtype="float32",
            # HFLM switches autocast off unless it is told of it.
            mixed_precision_dtype=autocast.fast_dtype if isinstance(autocast, torch.autocast) else None,
            trust_remote_code=False,
        )
        self._truncation = truncation
        self._cut_prompts: dict[str, set[str]] = {task: set() for task in truncation}
        self._task = ""
        self._scored_positions: int | None = None
        self._can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters

    def truncated(self, task: str) -> int:
        """How many different prompts of `task` were cut so far."""
        return len(self._cut_prompts[task])

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: lm-eval would ask the Hub for the model's commit."""
        return {}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if self.max_length - wanted < 2:
                raise DataError(
                    f"task {request.task_name} generates up to {wanted} tokens, which leaves no room for a prompt in "
                    f"{self.max_length}: raise --max-length to more than {wanted + 1}"
                )
        return self._each_task(requests, partial(super().generate_until, disable_tqdm=_no_bar(disable_tqdm)))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._each_task(requests, partial(super().loglikelihood, disable_tqdm=_no_bar(disable_tqdm)))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return self._each_task(requests, partial(super().loglikelihood_rolling, disable_tqdm=_no_bar(disable_tqdm)))

    def _each_task(self, requests: Sequence[Any], run: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """`run` on the requests of one task after the other, so that it is known whose prompt is cut."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name, []).append(place)
        answers: dict[int, Any] = {}
        for task, own in places.items():
            self._task = task
            answers |= zip(own, run([requests[place] for place in own]), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _fit(self, text: str, tokens: list[int], limit: int) -> list[int]:
        if len(tokens) <= limit:
            return tokens
        self._cut_prompts[self._task].add(text)
        return cut(tokens, limit, self._truncation[self._task])

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts to be continued, each cut for itself, padded on the left: ids and mask [B, T]."""
        assert padding_side == "left", "prompts that are continued end at the same place"
        limit = left_truncate_len or self.max_length
        rows = [self._fit(string, self.tok_encode(string), limit) for string in strings]
        longest = max(len(row) for row in rows)
        ids_BT = torch.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, ids_T, mask_T in zip(rows, ids_BT, mask_BT, strict=True):
            ids_T[longest - len(row) :] = torch.tensor(row)
            mask_T[longest - len(row) :] = 1
        return ids_BT, mask_BT

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        fitting = []
        for strings, context, answer in requests:
            room = self.max_length + 1 - len(answer)  # the last token of the answer is not read
            if room < 1 or len(answer) > self.max_length:
                raise DataError(
                    f"task {self._task} has an answer of {len(answer)} tokens, more than the context of "
                    f"{self.max_length}: raise --max-length"
                )
            # Windows of a rolling perplexity have no strings and fit already.
            fitting.append((strings, self._fit(strings[0], context, room) if strings else context, answer))
        alone = (override_bs or self.batch_size) == 1  # side by side, padding moves the answers to different places
        self._scored_positions = max((len(answer) for _, _, answer in requests), default=1) if alone else None
        quiet = _no_bar(disable_tqdm)
        return super()._loglikelihood_tokens(fitting, disable_tqdm=quiet, override_bs=override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, t, V] of the last t positions; `HFLM` finds the answer from the end."""
        if self._scored_positions is None or not self._can_leave_out:
            return super()._model_call(inps, attn_mask, labels)
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            return self.model(inps, logits_to_keep=self._scored_positions).logits


def _no_bar(disable: bool) -> bool:
    """A progress bar is for a person who watches; in a log file it is thousands of lines."""
    return disable or not sys.stderr.isatty()
