"""The final model on the Hugging Face Hub: asked about before training, pushed after saving.

Model, tokenizer and card are pushed, in one commit. Checkpoints, the run's log and manifest and the
training arguments stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from sftmix.model.source import JSON_FILES, TOKENIZERS
from sftmix.training.config import SFTMixOptions

# The bases of the hub's own error are what its client raises without an answer.
CLIENT_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError)
# What is pushed of a run that an earlier process has finished.
MODEL_FILES = (
    *("*.safetensors", *JSON_FILES, *TOKENIZERS, "merges.txt", "*.py"),
    *("chat_template.jinja", "additional_chat_templates/*"),
)


@dataclass(frozen=True)
class Repository:
    """Where a model goes, as ``--hub_model_id`` and the options beside it say."""

    name: str
    token: str | None  # None: the one that `hf auth login` has stored
    private: bool | None  # None: as the organisation's or the user's default is
    revision: str | None  # None: main

    def created(self) -> Repository:
        """Make the repository where there is none, and the branch; return it with its whole name.

        Raises:
            ValueError: the hub does not let us.
        """
        api = HfApi(token=self.token)
        try:
            made = api.create_repo(self.name, private=self.private, exist_ok=True)
            name = str(getattr(made, "repo_id", self.name))
            if self.revision is not None:
                api.create_branch(name, branch=self.revision, exist_ok=True)
        except CLIENT_ERRORS as error:
            raise ValueError(
                f"--push_to_hub: the hub refuses --hub_model_id {self.name}: {error}; nothing was "
                "trained yet, leave --push_to_hub out to train without it"
            ) from error
        return replace(self, name=name)

    def push(self, folder: Path, names: Sequence[str]) -> str:
        """Push files of a folder in one commit; return its address."""
        commit = HfApi(token=self.token).upload_folder(
            repo_id=self.name,
            folder_path=str(folder),
            allow_patterns=list(names),
            revision=self.revision,
            commit_message="Add the model that sftmix has trained",
        )
        return str(getattr(commit, "commit_url", self.name))


def repository(config: SFTMixOptions) -> Repository | None:
    """Return where the options want the final model pushed to, None where they do not.

    The trainer is told nothing of it: it would make a repository and push nothing to it.

    Raises:
        ValueError: no repository is named, there is no token, or the hub is switched off.
    """
    if not config.push_to_hub:
        return None
    config.push_to_hub = False
    name, token = config.hub_model_id, config.hub_token
    if not name:
        raise ValueError("--push_to_hub: expected --hub_model_id USER/NAME with it, got none")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub: HF_HUB_OFFLINE is set; unset it, or leave the option out")
    if not (token or get_token()):
        raise ValueError(
            "--push_to_hub: expected a token that may write, got none; run `hf auth login`, or set "
            "HF_TOKEN"
        )
    return Repository(name, token, config.hub_private_repo, config.hub_revision)


def model_files(run: Path) -> list[str]:
    """Return the names of a final model's files, its tokenizer's among them."""
    found = {path for pattern in MODEL_FILES for path in run.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(run)) for path in found)
