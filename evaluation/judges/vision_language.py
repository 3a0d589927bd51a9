"""A vision-language model of transformers as a judge: Qwen3-VL, or any AutoModelForImageTextToText.

Questions are asked one by one, each with its own seed. An answer depends on no other question, on no rank and on
no interruption (on one kind of device; other kernels may round differently).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from base import files, hub
from base.config import UserError, describing
from data.samples.captions import check_whole
from evaluation.judges.interface import EDITSCORE, Decoding, metric_name
from tokenizer.weights import freeze, read_tensors, state_hash

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."


class TransformersJudge:
    """A model of transformers as evaluation.judges.interface.VisionLanguageJudge."""

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        decoding: Decoding = EDITSCORE,
        device: str = "cpu",
        source: str = "given",
    ) -> None:
        """`model` and `processor` of transformers; `source`: where the weights come from, for the record."""
        self.name = name
        self._device = torch.device(device)
        self._model = model.to(self._device)
        freeze(self._model)
        self._processor, self._decoding = processor, decoding
        self.protocol: Mapping[str, Any] = {
            "judge": source,
            "decoding": vars(decoding),
            "dtype": str(model.dtype),
        }
        template, pictures = (getattr(processor, name, None) for name in ("chat_template", "image_processor"))
        # The image processor decides, among others, the size that the model sees.
        prepared = None if pictures is None else pictures.to_json_string()
        self.fingerprint = files.digest([state_hash(model), vars(decoding), template, prepared])

    @classmethod
    def load(
        cls,
        model: str,
        *,
        adapter: Path | None = None,
        name: str | None = None,
        decoding: Decoding = EDITSCORE,
        device: str = "cpu",
    ) -> TransformersJudge:
        """`model`: a name of the hub or a folder; `adapter`: a folder with a LoRA of the model, such as EditScore's.

        `name`: default the model's and the adapter's. bf16 on a GPU, fp32 on a CPU. Raises UserError: no such model or
        adapter.
        """
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        with hub.described(f"judge '{model}'"):
            network = hub.from_pretrained(AutoModelForImageTextToText, model, dtype=dtype)
            processor = hub.from_pretrained(AutoProcessor, model)
        source, weights = model, model
        if adapter is not None:
            merge_adapter(network, adapter)
            source, weights = f"{model} with {adapter.name}", adapter.resolve().name
        return cls(name or metric_name(weights), network, processor, decoding, device, source)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], text: str, seed: int, text_first: bool = False) -> str:
        """uint8 [3, H, W] each, any sizes -> the answer."""
        pictures = [{"type": "image", "image": Image.fromarray(x.permute(1, 2, 0).numpy())} for x in images]
        words = [{"type": "text", "text": check_whole(text, "a question")}]
        content = [*words, *pictures] if text_first else [*pictures, *words]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device)
        drawn = self._decoding.temperature > 0
        options = {
            "do_sample": drawn,
            "temperature": self._decoding.temperature if drawn else None,
            "top_p": self._decoding.top_p if drawn else None,
            "top_k": self._decoding.top_k if drawn else None,
        }
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            ids = self._model.generate(**inputs, **options, max_new_tokens=self._decoding.max_new_tokens)
        answer = ids[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.decode(answer, skip_special_tokens=True)).strip()


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Adds a LoRA (Hu et al. 2021) to the weights it was trained for: W + s B A, in fp32.

    s = alpha / r, or alpha / sqrt(r) if the config says so. Raises UserError: no such files, an adapter that
    is not a plain LoRA, a tensor without a matching weight.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; give a folder with a LoRA, as peft writes it")
    config = files.read_object(folder / ADAPTER_CONFIG)
    special = [
        name for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(name)
    ]
    if special or config.get("bias", "none") != "none":
        raise UserError(
            f"{folder}: more than a plain LoRA ({', '.join(special) or 'bias'}); merge it with peft first"
        )
    with describing(folder / ADAPTER_CONFIG):
        rank = int(config["r"])
        scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    parameters = dict(model.named_parameters())
    targets = sorted({name.rpartition(".lora_")[0] for name in tensors})
    for target in targets:
        place = f"{target.removeprefix(ADAPTER_PREFIX)}.weight"
        a, b = (tensors.get(f"{target}.lora_{letter}.weight") for letter in "AB")
        weight = parameters.get(place)
        if a is None or b is None or weight is None or weight.shape != (b.shape[0], a.shape[1]):
            raise UserError(
                f"{folder}: '{target}' has no place in the model; it is an adapter of another one"
            )
        with torch.no_grad():
            weight.copy_(weight.float() + scale * (b.float() @ a.float()).to(weight.device))
