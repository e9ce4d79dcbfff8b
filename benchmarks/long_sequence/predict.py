"""Write what `sftmix plan` says of our modes into a result file; nothing is measured here."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import LlamaConfig

from sftmix import SFTMixConfig
from sftmix.plan import plan_step
from sftmix.recipe.arguments import RunArguments

from .runs import Run
from .settings import CPU, MODES, PREDICTION, model_size


def predict(wanted: Run) -> int:
    """Predict every length in every mode of ours."""
    subject = wanted.subject
    arguments = RunArguments(
        model="", data=[], output="", dtype=subject.dtype, lora_rank=subject.lora_rank
    )
    points = [(m, n) for m in wanted.modes if MODES[m].ours for n in wanted.lengths]
    wanted.results.report["records"].clear()
    for mode, length in tqdm(points, unit="plan", desc=wanted.model):
        options: dict[str, Any] = {"output_dir": "", "use_cpu": True, **MODES[mode].options}
        config = SFTMixConfig(**options, per_device_train_batch_size=2)
        model = LlamaConfig(**model_size(subject))
        plan = plan_step(model, arguments, config, length, on_cpu=wanted.device == CPU)
        wanted.results.add(
            measure=PREDICTION,
            mode=mode,
            length=length,
            peak_bytes=plan.peak,
            host_bytes=plan.host,
            moment=plan.moment,
            parts=plan.parts,
        )
    return 0
