"""Hugging Face transformers with accelerate, the MLPs held elsewhere: read for each pass, as ours on the host are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.contenders.hugging_face import generated
from benchmarks.contenders.trial import Continued
from coreinfer_jax.io.export import write_hugging_face
from coreinfer_jax.io.mapping import source_names
from coreinfer_jax.model.weights import Params


def load(params: Params, folder: Path) -> Any:
    """`params`, on the device, as a model of transformers whose checkpoint is written into the empty `folder`.

    On a CPU accelerate reads the MLPs from the checkpoint's file for each pass; nothing is moved by what it calls
    offloading to a CPU. On a GPU they are in the host's memory, from where it moves them.
    """
    write_hugging_face(folder, params, np.dtype(params.dtype))
    where = (0, "cpu") if torch.cuda.is_available() else ("cpu", "disk")
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, params.dtype.name), device_map=_device_map(params, folder, *where)
    )
    return model.eval()


def _device_map(params: Params, folder: Path, rest: int | str, mlps: str) -> dict[str, int | str]:
    """Where each module of weights is: products of MLPs in `mlps`, all others on `rest`."""
    names = source_names(params.config).items()
    of_mlps = {f"model.{stored.rpartition('.')[0]}" for name, stored in names if ".mlp." in name}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    modules = [name for name, module in model.named_modules() if not list(module.children())]
    return {name: mlps if name in of_mlps else rest for name in modules}


def continued(model: Any, prompt: Sequence[int], new: int) -> Continued:
    """`prompt` with `new` greedy tokens."""
    times, tokens = generated(model, torch.tensor([list(prompt)], device=model.device), new, {})
    return Continued(tokens[0].cpu().numpy().astype(np.int32), times[-1] - times[1])
