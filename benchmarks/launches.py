"""Count what a card is asked to do in an update: the number of calls is what bounds a fast one.

    python benchmarks/launches.py sdxl        or sd15

The denoiser has its real depth and a tenth of its width, on which the number does not depend. It
runs on a CPU, in bf16. Autocast leaves norms in half precision there, and widens them on CUDA;
that is imitated. Views are not counted, as nothing is computed for them.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from models import DENOISERS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_lora import ATTENTION, SDXL, Learner, Models, TrainingConfig

Norm = Callable[..., torch.Tensor]

NARROW: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 64, 128, 128)},
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "attention_head_dim": (1, 2, 4),
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 256,
    },
}


class Calls(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at an operation on its way to the device."""
        self.names[function.name()] += not function.is_view
        return function(*args, **(kwargs or {}))


@contextmanager
def norms_as_on_cuda() -> Iterator[None]:
    """Let norms widen what they are given, as autocast has it there."""
    plain: tuple[Norm, Norm] = functional.group_norm, functional.layer_norm

    def widened(norm: Norm) -> Norm:
        def call(value: torch.Tensor, *others: Any) -> torch.Tensor:
            wide = [o.float() if isinstance(o, torch.Tensor) else o for o in others]
            return norm(value.float(), *wide)

        return call

    functional.group_norm, functional.layer_norm = map(widened, plain)
    try:
        yield
    finally:
        functional.group_norm, functional.layer_norm = plain


def narrow(size: str) -> Any:
    """Make a narrow denoiser in half precision."""
    shape = DENOISERS[size] | NARROW[size] | {"cross_attention_dim": 64}
    unet: Any = UNet2DConditionModel(**shape)
    return unet.requires_grad_(requires_grad=False).to(torch.bfloat16)


def passes(unet: Any, dtype: torch.dtype) -> None:
    """Go there and back once."""
    noisy, text = torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 16, 64, dtype=dtype)
    told = {"text_embeds": torch.randn(1, 64, dtype=dtype), "time_ids": torch.ones(1, 6)}
    answer = unet(noisy, torch.tensor([500]), text, added_cond_kwargs=told).sample
    functional.mse_loss(answer.float(), torch.randn(1, 4, 8, 8)).backward()


def textbook(size: str) -> Counter[str]:
    """Count where autocast converts what it meets, the adapter's matrices among it."""
    unet, calls = narrow(size), Calls()
    unet.add_adapter(LoraConfig(r=16, target_modules=ATTENTION))
    cast_training_params(unet, torch.float32)
    with calls, torch.autocast("cpu", torch.bfloat16), norms_as_on_cuda():
        passes(unet, torch.float32)
    return calls.names


def ours(size: str) -> Counter[str]:
    """Count where all is in half precision, and the adapter is converted once."""
    unet, calls = narrow(size), Calls()
    base: Any = SimpleNamespace(family=SDXL)
    models = Models(base, torch.device("cpu"), torch.bfloat16, None, [], denoiser=unet)
    places = {"dataset_path": "images", "base_model": "base", "output_path": "out"}
    config = TrainingConfig.from_record({**places, "trigger_words": ["zkb"]})
    learner = Learner(models, config)
    with calls:
        passes(unet, torch.bfloat16)
        learner.collect()
        learner.refresh()
    return calls.names


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description="Count the calls of an update.")
    parser.add_argument("size", choices=list(NARROW), nargs="?", default="sdxl")
    size = parser.parse_args().size
    for name, count in {"textbook": textbook, "train_lora.py": ours}.items():
        names = count(size)
        idle = names["aten::_unsafe_view"] + names["aten::empty.memory_format"]
        total, changed = sum(names.values()) - idle, names["aten::_to_copy"]
        sys.stdout.write(f"{name}: {total:,} calls, {changed:,} of them change precision\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
