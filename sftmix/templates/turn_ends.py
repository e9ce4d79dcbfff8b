"""Compare where training ends turns with where generation stops.

The chat template decides what follows a response in training; `model.generate` stops at
`generation_config.eos_token_id`. If they differ, as for ChatML on a base model that ends texts with
<|endoftext|>, even a well trained model answers on to its limit. So the token that ends a turn is
added to those that generation stops at, before training and again when the model is saved.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftmix.runs.ranks import is_main
from sftmix.templates.chat import chat_template, end_of_turn

logger = logging.getLogger(__name__)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a turn: the first special or added one of `end_of_turn`.

    It is None if the template ends no turn, or ends it with words.

    Raises:
        ValueError: as `end_of_turn` does.
    """
    added = tokenizer.added_tokens_decoder
    marker = tokenizer(end_of_turn(tokenizer), add_special_tokens=False, verbose=False)
    return next((token for token in marker["input_ids"] if token in added), None)


def stop_tokens(of_model: Any) -> list[int]:
    """Return the end-of-sequence tokens of a model's generation config, in order."""
    return [of_model] if isinstance(of_model, int) else list(of_model or ())


class TurnEnds:
    """How turns end in training, compared with where the model's generation stops.

    Nothing is known or done for a tokenizer whose template cannot be tried on a question and its
    answer, nor for a trainer without a tokenizer (`processing_class`).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.marker, self.token, self.template = None, None, None
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            # The examples that a template refuses say what is wrong with it.
            with contextlib.suppress(ValueError):
                self.template = chat_template(tokenizer)
                self.marker, self.token = end_of_turn(tokenizer), end_token(tokenizer)

    def align(self, model: Any) -> None:
        """Make generation stop at the end of turn that training teaches, besides the model's."""
        config = getattr(model, "generation_config", None)
        if config is None or self.token is None:
            return
        known = stop_tokens(config.eos_token_id)
        if self.token not in known:
            config.eos_token_id = [*known, self.token] if known else self.token

    def warn(self) -> None:
        """Log one warning if a trained model would not end its turns by a token."""
        if self.marker is None or self.token is not None or not is_main():
            return
        if self.marker:
            logger.warning(
                "the chat template ends a turn with the text %r, of which no token stands for "
                "itself: transformers' generate stops there only with stop_strings and tokenizer "
                "given; sftmix generate does",
                self.marker,
            )
        else:
            logger.warning(
                "the chat template ends no turn: the model does not learn where to stop, and goes "
                "on to the limit when it is asked. Give --chat_template FILE with one that writes "
                "an end after each response, such as eos_token"
            )

    def check(self) -> None:
        """Log a warning if the template that is saved is not the one that training began with.

        The model answers as it was trained only under that template.
        """
        now = TurnEnds(self.tokenizer)
        if now.template != self.template and is_main():
            logger.warning(
                "the tokenizer's chat template was changed since the trainer was made: what is "
                "saved ends its turns with %r, training with %r",
                now.marker,
                self.marker,
            )


def stop_advice(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sentence for a model's card: how to tell `generate` where a turn ends.

    Raises:
        ValueError: as `end_of_turn` does.
    """
    token = end_token(tokenizer)
    if token is not None:
        return (
            f"That is token {token}: if the generation config lacks it, as the base model's under "
            "an adapter does, pass it to `generate` as `eos_token_id`."
        )
    return "No token stands for it: give `generate` this text in `stop_strings`."
