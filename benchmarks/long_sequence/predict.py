"""What `sftmix plan` says of our modes, in a result file of its own; nothing is measured here."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import LlamaConfig

from sftmix import SFTMixConfig
from sftmix.plan import plan_step
from sftmix.recipe.arguments import RunArguments

from .runs import OF_BATCH, PREDICTION, Run
from .settings import CPU, MODES


def predict(wanted: Run) -> int:
    """Predict every length in every mode of ours."""
    subject = wanted.subject
    size = {n: v for n, v in subject.size._asdict().items() if n not in OF_BATCH}
    arguments = RunArguments(
        model="", data=[], output="", dtype=subject.dtype, lora_rank=subject.lora_rank
    )
    points = [(m, n) for m in wanted.modes if MODES[m].ours for n in wanted.lengths]
    wanted.results.report["records"].clear()
    for mode, length in tqdm(points, unit="plan", desc=wanted.model):
        options: dict[str, Any] = {"output_dir": "", "use_cpu": True, **MODES[mode].options}
        config = SFTMixConfig(**options, per_device_train_batch_size=2)
        plan = plan_step(
            LlamaConfig(**size), arguments, config, length, on_cpu=wanted.device == CPU
        )
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
