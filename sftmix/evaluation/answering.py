"""Let a model answer batches of questions, turn by turn.

A question's sampled tokens depend on the seed, the question and its turn, not on the questions
beside it: token t is the inverse of the distribution's cumulative sum at the t-th number of the
question's own generator. Only rounding depends on the batch: a matrix product of another shape, and
padding, change the logits' last bits, so a near tie may fall the other way.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from sftmix.data.examples_check import check_command
from sftmix.evaluation.questions import Answer, Question
from sftmix.templates.chat import Turns, end_of_turn, prompt_tokens, without_thought
from sftmix.templates.turn_ends import end_token, stop_tokens

# FastChat (gen_model_answer.py) takes the likeliest token below this.
GREEDY_BELOW = 1e-4


@dataclass(frozen=True)
class Decoding:
    """The options of sampling."""

    max_new_tokens: int
    temperature: float | None = None  # None: that of each question
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, which means all, got {self.top_k}")

    def temperature_of(self, question: Question) -> float:
        """Return the temperature of a question; 0 means the likeliest token."""
        asked = question.temperature if self.temperature is None else self.temperature
        return asked if asked >= GREEDY_BELOW else 0.0

    def draws(self, question: Question, turn: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return a number in [0, 1) for each new token of a turn."""
        text = repr((self.seed, question.key, turn))
        seed = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest(), "big")
        return np.random.default_rng(seed).random(self.max_new_tokens)


def sampled(scores: Tensor, temperatures: Tensor, uniform: Tensor, top_k: int) -> Tensor:
    """Return tokens drawn from softmax(scores / temperature) among the `top_k` likeliest (0: all).

    Args:
        scores: (B, V) floats on any device.
        temperatures: (B,) float64 on the CPU.
        uniform: (B,) float64 in [0, 1) on the CPU; where the cumulative sum of the probabilities,
            largest first, comes above it, there is the token.

    Returns:
        (B,) int64 on the CPU.
    """
    # The draw is on the CPU, and so alike for all devices, some of which have no float64.
    best = scores.topk(min(top_k or scores.shape[-1], scores.shape[-1]))
    cdf = (best.values.cpu().double() / temperatures[:, None]).softmax(-1).cumsum(-1)
    place = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    return best.indices.cpu().gather(1, place.clamp(max=cdf.shape[-1] - 1))[:, 0]


class Draws(LogitsProcessor):
    """Leave each row only the token that it takes, which greedy search then takes.

    Rows of temperature 0 take the likeliest token, the others what `sampled` says of their numbers.
    """

    def __init__(
        self,
        temperatures: Tensor,  # (B,) float64
        uniform: Tensor,  # (B, max_new_tokens) float64
        top_k: int,
        prompt_length: int,
    ) -> None:
        self.sampled = temperatures.nonzero()[:, 0]
        self.temperatures = temperatures[self.sampled]
        self.uniform, self.top_k, self.prompt_length = uniform[self.sampled], top_k, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        """Return the scores with all but one of each row at minus infinity.

        Raises:
            FloatingPointError: a score is not a number.
        """
        if scores.isnan().any():
            raise FloatingPointError("the model's logits are not numbers (NaN): is it damaged?")
        tokens = scores.argmax(-1)
        if len(self.sampled):
            uniform = self.uniform[:, input_ids.shape[1] - self.prompt_length]
            rows = self.sampled.to(scores.device)
            drawn = sampled(scores[rows], self.temperatures, uniform, self.top_k)
            tokens[rows] = drawn.to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class Answerer:
    """A model, its tokenizer, and the end of its answers.

    An answer ends at the tokenizer's or the model's end-of-sequence tokens, or at what the chat
    template writes after a response, and begins behind a thought. Nothing else of the model's
    `generation_config` is heeded.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> None:
        check_command(model, tokenizer)
        self.model, self.tokenizer, self.decoding = model.eval(), tokenizer, decoding
        self.stops, self.stop_text = stops(tokenizer, model.generation_config.eos_token_id)
        pad = tokenizer.pad_token_id
        self.opens_thought = Turns(tokenizer).opens_thought
        self.pad = min(self.stops, default=0) if pad is None else pad
        self.batch_is_checked = False
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=self.pad,
            stop_strings=self.stop_text or None,
        )
        # PEFT's wrapper uses the config of the model inside.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.generation_config = config

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask the questions of a batch; later turns are asked with the earlier answers before them.

        Raises:
            ValueError: a prompt and the new tokens are more than the model has positions.
            FloatingPointError: the model's logits are not numbers.
        """
        answers = [Answer(question.key, [], [], [], 0.0) for question in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
            asked = [questions[row] for row in rows]
            prompts = [self.prompt(questions[row], answers[row].turns) for row in rows]
            for row, tokens in zip(rows, self.generate(asked, prompts, turn), strict=True):
                self._append(answers[row], tokens)
        return answers

    def prompt(self, question: Question, earlier: Sequence[str]) -> list[int]:
        """Return the tokens before the next answer.

        Raises:
            ValueError: they and the new tokens are more than the model has positions, or the chat
                template refuses the conversation.
        """
        messages = [{"role": "user", "content": question.turns[0]}]
        for text, following in zip(earlier, question.turns[1:], strict=False):
            messages.append({"role": "assistant", "content": text})
            messages.append({"role": "user", "content": following})
        try:
            tokens = prompt_tokens(tuple(messages), self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{question}: {error}") from None
        self._check_room(question, len(tokens) + self.decoding.max_new_tokens)
        return tokens

    def check(self, question: Question) -> int:
        """Return the length of the first prompt, after checking the room for full-length answers.

        Raises:
            ValueError: they have not; or as `prompt`.
        """
        blank = ["."] * (len(question.turns) - 1)
        last = len(self.prompt(question, blank))
        self._check_room(question, last + len(question.turns) * self.decoding.max_new_tokens)
        return len(self.prompt(question, []))

    def _check_room(self, question: Question, length: int) -> None:
        config = self.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and length > room:
            raise ValueError(
                f"max_new_tokens: {question} needs {length} positions with answers of "
                f"{self.decoding.max_new_tokens} tokens, and the model has {room}; give fewer"
            )

    @torch.inference_mode()
    def generate(
        self, questions: Sequence[Question], prompts: Sequence[list[int]], turn: int
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, padded to the longest answer."""
        longest, device = max(map(len, prompts)), self.model.device
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [[self.pad] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        temperatures = [self.decoding.temperature_of(question) for question in questions]
        uniform = np.stack([self.decoding.draws(question, turn) for question in questions])
        if len(ids) > 1 and not self.batch_is_checked:
            self.check_batch(ids, mask, padding)
        draws = Draws(
            torch.tensor(temperatures, dtype=torch.float64),
            torch.from_numpy(uniform),
            self.decoding.top_k,
            longest,
        )
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=LogitsProcessorList([draws]),
            **({"tokenizer": self.tokenizer} if self.stop_text else {}),
        )
        new: list[list[int]] = output[:, longest:].tolist()
        return new

    def check_batch(self, ids: list[list[int]], mask: list[list[int]], padding: list[int]) -> None:
        """Compare the logits of two new tokens in a batch with those of the prompt by itself.

        The prompt is the one with the most padding, and the second token comes from the model's
        cache of the first. Differences up to half the digits count as rounding.

        Raises:
            ValueError: they differ: the model reads padding as text, or mixes its rows.
        """
        row = padding.index(max(padding))
        single = [ids[row][padding[row] :]]
        together = self.first_logits(ids, mask, row)
        for step, (found, own) in enumerate(
            zip(together, self.first_logits(single, [[1] * len(single[0])], 0), strict=True)
        ):
            difference = (found - own).abs().max()
            if difference > torch.finfo(self.model.dtype).eps ** 0.5 * own.abs().max():
                raise ValueError(
                    f"batch_size: the logits of {type(self.model).__name__} move by "
                    f"{difference:.3g} at new token {step + 1} with the prompts beside it, whose "
                    "padding or state it reads; use --batch_size 1"
                )
            if found.argmax() != own.argmax():
                break  # a near tie: the next token follows another one
        self.batch_is_checked = True

    def first_logits(
        self, ids: list[list[int]], mask: list[list[int]], row: int
    ) -> tuple[Tensor, ...]:
        """Return a row's logits of the first two new tokens, each (V,)."""
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            max_new_tokens=2,
            min_new_tokens=2,
            output_logits=True,
            return_dict_in_generate=True,
            **({"tokenizer": self.tokenizer} if self.stop_text else {}),
        )
        return tuple(logits[row].float() for logits in output.logits)

    def _append(self, answer: Answer, tokens: list[int]) -> None:
        """Add a turn: its text up to its end, without the thought and white space around it."""
        length = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        tokens = tokens[:length]
        while tokens and tokens[-1] == self.pad:
            tokens = tokens[:-1]
        # Cleaning up would change what the model wrote: "a , b" would become "a, b".
        text = cast(
            str,
            self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
        )
        cut = bool(self.stop_text) and self.stop_text in text
        if cut:
            text = text.partition(self.stop_text)[0]
        answer.turns.append(without_thought(text, opened=self.opens_thought).strip())
        answer.num_tokens.append(len(tokens))
        answer.ended.append(cut or length is not None)
        answer.time = time.time()


def stops(tokenizer: PreTrainedTokenizerBase, of_model: Any) -> tuple[set[int], str]:
    """Return the tokens that end an answer, and the text that ends it if no special token does.

    `of_model`: the end-of-sequence token or tokens of the model's generation config, or None.
    """
    tokens = set(stop_tokens(of_model))
    if tokenizer.eos_token_id is not None:
        tokens.add(tokenizer.eos_token_id)
    token = end_token(tokenizer)
    return (tokens, end_of_turn(tokenizer)) if token is None else (tokens | {token}, "")
