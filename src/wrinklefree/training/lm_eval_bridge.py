"""Our models inside lm-eval's harness (extra `eval`): local task files without a network, hub tasks where there is a hub.

The harness asks for log-likelihoods of continuations, for rolling log-likelihoods of texts, and for greedy text up to stop
strings. Everything is scored at lambda = 1 and full SubLN strength, in the library's own tokens.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional

from wrinklefree.data.tokens import start_token_id
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import fully_quantized, padded_batch
from wrinklefree.utils.errors import ConfigError, NotAvailableError
from wrinklefree.utils.tokenizer import TextTokenizer

ROWS_PER_BATCH = 16
DEFAULT_NEW_TOKENS = 256


class Request(Protocol):
    """What the harness calls an instance."""

    @property
    def args(self) -> tuple[Any, ...]:
        """(context, continuation), (text,) or (context, generation options)."""
        ...


def require_lm_eval() -> None:
    """Check that the harness is there.

    Raises:
        NotAvailableError: naming the extra that brings it.
    """
    if find_spec("lm_eval") is None:
        raise NotAvailableError(
            "lm_eval:... tasks need the extra eval (uv sync --extra eval); tasks without that prefix need nothing"
        )


class HarnessRequests:
    """The three questions of the harness, answered by one of our models; knows nothing of the harness itself."""

    def __init__(self, model: CausalLM, tokenizer: TextTokenizer, *, compute: Compute, max_seq_length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.compute, self.max_seq_length = compute, max_seq_length

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would produce it.

        A pair is encoded as one text, split where the context's tokens end. A context too long loses its beginning.
        """
        rows: list[tuple[list[int], int]] = []
        for request in requests:
            context, continuation = request.args
            rows.append(self._context_and_targets(context, continuation))
        return self._score(rows)

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Log-probability of each whole text: every token is predicted once, with as much context as a row holds."""
        rows: list[tuple[list[int], int]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            for row in rolling_rows(
                self.tokenizer.encode(request.args[0]), start_token_id(self.tokenizer), self.max_seq_length
            ):
                rows.append(row)
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(rows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Greedy text of each context, cut before the first stop string.

        Raises:
            ConfigError: the task asks for sampling, which would make scores a matter of luck.
        """
        answers: list[str] = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
                raise ConfigError("an lm_eval task asks for sampled text (do_sample); only greedy decoding is scored")
            until = options.get("until", [])
            stops = [until] if isinstance(until, str) else list(until)
            new_tokens = min(int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)), self.max_seq_length - 2)
            ids = [start_token_id(self.tokenizer), *self.tokenizer.encode(context)][
                -(self.max_seq_length - new_tokens) :
            ]
            with fully_quantized(self.model), self.compute.autocast():
                [response] = generate(
                    self.model, [ids], max_new_tokens=new_tokens, eos_token_id=self.tokenizer.eos_token_id
                )
            answers.append(cut_at_stop(self.tokenizer.decode(response), stops))
        return answers

    def _context_and_targets(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of a row, and how many at its end are targets.

        Trailing spaces of the context belong to the continuation's first word, as tokenizers join them.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        start = start_token_id(self.tokenizer)
        whole, before = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
        targets = len(whole) - len(before)
        if targets < 1:
            raise ConfigError(f"the continuation {continuation!r} of an lm_eval task has no token of its own")
        row = [start, *whole]
        if targets >= self.max_seq_length:
            raise ConfigError(
                f"a continuation of an lm_eval task has {targets} tokens; raise max_seq_length={self.max_seq_length}"
            )
        return row[-self.max_seq_length :], targets

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For each row: summed log-probability of its last `targets` tokens, and whether each was the most likely."""
        found: list[tuple[float, bool]] = [(math.nan, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        with fully_quantized(self.model):
            for first in range(0, len(order), ROWS_PER_BATCH):
                picked = order[first : first + ROWS_PER_BATCH]
                batch, lengths = padded_batch([rows[index][0] for index in picked], self.tokenizer.pad_token_id)
                with self.compute.autocast():
                    output = self.model(batch.to(self.compute.device))
                for place, index in enumerate(picked):
                    row, targets = rows[index]
                    end = int(lengths[place])
                    hidden = output.hidden[place, end - targets - 1 : end - 1]
                    logits = (hidden @ output.head_weight.to(hidden.dtype).T).float().cpu()
                    wanted = torch.tensor(row[-targets:])
                    chosen = functional.log_softmax(logits, dim=-1)[torch.arange(targets), wanted]
                    found[index] = (float(chosen.sum()), bool((logits.argmax(dim=-1) == wanted).all()))
        return found


def rolling_rows(ids: Sequence[int], start: int, length: int) -> list[tuple[list[int], int]]:
    """Rows of at most `length` tokens in which every token of `ids` is a target once.

    The first row begins with the start token; later ones with the text before their targets, so that the last targets too
    see a full row. A row is (tokens, targets at its end).
    """
    stream = [start, *ids]
    rows: list[tuple[list[int], int]] = []
    done = 0
    while done < len(ids):
        targets = min(length - 1, len(ids) - done)
        end = done + targets + 1
        rows.append((stream[max(0, end - length) : end], targets))
        done += targets
    return rows


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def evaluate_harness(
    model: CausalLM,
    tokenizer: TextTokenizer,
    tasks: Sequence[str],
    *,
    compute: Compute,
    max_seq_length: int,
    max_examples: int | None,
    task_folder: Path | None,
) -> Mapping[str, Mapping[str, Any]]:
    """Task -> metric -> value, as the harness reports them.

    Raises:
        NotAvailableError: the harness is not installed.
        ConfigError: it does not know a task.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    # The harness accepts subclasses of its LM only, and its class exists only where the extra is installed.
    class HarnessModel(HarnessRequests, LM):
        """One of our models as the harness wants it."""

        def __init__(self) -> None:
            LM.__init__(self)
            HarnessRequests.__init__(self, model, tokenizer, compute=compute, max_seq_length=max_seq_length)

    manager = TaskManager(
        include_path=None if task_folder is None else str(task_folder), include_defaults=task_folder is None
    )
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = "the harness" if task_folder is None else f"lm_eval_tasks={task_folder}"
        raise ConfigError(f"{where} has no task {', '.join(unknown)}")
    report = simple_evaluate(HarnessModel(), tasks=list(tasks), limit=max_examples, task_manager=manager)
    assert report is not None, "one process always gets the report"
    return {task: dict(report["results"][task]) for task in tasks}
