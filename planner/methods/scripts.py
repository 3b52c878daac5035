"""Scripts for a person that make an artifact by hand, with the calls that ``apply`` makes. Text only."""

from __future__ import annotations

from planner.core.candidate import Variant
from planner.core.model import ModelSpec
from planner.methods import quantizers
from planner.methods.serving import artifact_name, weights_id

SAMPLES = 128
SAMPLE_TOKENS = 512
"""Chunks of calibration text that are used unasked, as many as an importance matrix takes."""


def quantize(model: ModelSpec, variant: Variant) -> str:
    """The script of the program that makes ``variant``; a remark where none does."""
    way = quantizers.way_of(variant)
    if way is None:
        return f"# no program that qplan knows makes {variant.label()}"
    makers = {"gptqmodel": _gptqmodel, "llm-compressor": _llm_compressor, "autoawq": _autoawq}
    row = quantizers.quantizer(way.quantizer)
    head = [f"# pip install {package_of(row)}"]
    return "\n".join(head + makers[way.quantizer](model, variant))


def recast(model: ModelSpec, type_: str) -> str:
    """The script that converts the published weights; ``apply`` does so without loading the model."""
    dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[type_]
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({weights_id(model)!r}, dtype={dtype!r})",
            f"model.save_pretrained({f'{weights_id(model)}-{type_}'!r})",
        )
    )


def package_of(row: quantizers.Quantizer) -> str:
    """The requirement that installs a quantizer: ``gptqmodel==7.6.0``."""
    return f"{row.packages[0]}=={row.version}"


def _chunks(source: str) -> list[str]:
    return [
        "from transformers import AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({source!r})",
        'ids = tokenizer(open("calibration.txt").read(), add_special_tokens=False).input_ids',
        f"chunks = [ids[i : i + {SAMPLE_TOKENS}] for i in range(0, len(ids) - {SAMPLE_TOKENS - 1}, {SAMPLE_TOKENS})]",
    ]


def _bits(variant: Variant) -> int:
    return int(variant.type.removesuffix("bit"))


def _gptqmodel(model: ModelSpec, variant: Variant) -> list[str]:
    own = f"desc_act={variant.act_order}" if variant.method == "gptq" else f'format="{variant.format[len("awq-") :]}"'
    return [
        "from gptqmodel import GPTQModel, QuantizeConfig",
        *_chunks(weights_id(model)),
        f"config = QuantizeConfig(method={variant.method!r}, bits={_bits(variant)}, group_size={variant.group_size}, "
        f"sym={variant.symmetric}, {own})",
        f"model = GPTQModel.load({weights_id(model)!r}, config)",
        f'samples = [{{"input_ids": c, "attention_mask": [1] * len(c)}} for c in chunks[:{SAMPLES}]]',
        "model.quantize(samples, batch_size=1)",
        f"model.save({artifact_name(model, variant)!r})",
    ]


def _llm_compressor(model: ModelSpec, variant: Variant) -> list[str]:
    target = artifact_name(model, variant)
    load = f"model = AutoModelForCausalLM.from_pretrained({weights_id(model)!r}, dtype='auto')"
    if variant.type == "fp8":
        return [
            "from llmcompressor import oneshot",
            "from llmcompressor.modifiers.quantization import QuantizationModifier",
            "from transformers import AutoModelForCausalLM",
            load,
            'recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])',
            "oneshot(model=model, recipe=recipe)",
            f"model.save_pretrained({target!r}, save_compressed=True)",
        ]
    strategy = '"channel"' if variant.group_size in (None, -1) else f'"group", group_size={variant.group_size}'
    groups = 'config_groups={"group_0": scheme}, ignore=["lm_head"]'
    modifiers = ["from llmcompressor.modifiers.gptq import GPTQModifier"]
    recipe = f"GPTQModifier({groups})"
    if variant.method == "awq":
        modifiers = [
            "from llmcompressor.modifiers.quantization import QuantizationModifier",
            "from llmcompressor.modifiers.transform.awq import AWQModifier",
        ]
        recipe = f"[AWQModifier(), QuantizationModifier({groups})]"
    return [
        "from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme",
        "from datasets import Dataset",
        "from llmcompressor import oneshot",
        *modifiers,
        "from transformers import AutoModelForCausalLM",
        *_chunks(weights_id(model)),
        load,
        f"weights = QuantizationArgs(num_bits={_bits(variant)}, symmetric={variant.symmetric}, strategy={strategy})",
        'scheme = QuantizationScheme(targets=["Linear"], weights=weights)',
        f"recipe = {recipe}",
        f'data = Dataset.from_dict({{"input_ids": chunks[:{SAMPLES}]}})',
        f"oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples={SAMPLES}, "
        f"max_seq_length={SAMPLE_TOKENS})",
        f"model.save_pretrained({target!r}, save_compressed=True)",
    ]


def _autoawq(model: ModelSpec, variant: Variant) -> list[str]:
    version = variant.format.removeprefix("awq-").upper()
    return [
        "from awq import AutoAWQForCausalLM",
        *_chunks(weights_id(model)),
        f"model = AutoAWQForCausalLM.from_pretrained({weights_id(model)!r})",
        f'config = {{"zero_point": True, "q_group_size": {variant.group_size}, "w_bit": 4, "version": {version!r}}}',
        f"model.quantize(tokenizer, quant_config=config, calib_data=[tokenizer.decode(c) for c in chunks[:{SAMPLES}]])",
        f"model.save_quantized({artifact_name(model, variant)!r})",
    ]
