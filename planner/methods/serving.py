"""Commands for a person: how to quantize by hand and how to serve. Text only; nothing here is executed."""

from __future__ import annotations

from planner.core.candidate import Candidate, Placement, Variant
from planner.core.model import ModelSpec

CALIBRATION_SAMPLES = 256
"""Samples of calibration text in the printed scripts, GPTQModel's documented middle value."""


def weights_id(model: ModelSpec) -> str:
    """What a loader is given for the unquantized weights: a directory or a hub id."""
    return model.source.hub_id or model.source.location


def artifact_name(model: ModelSpec, variant: Variant) -> str:
    """Name of the file or directory a variant is written to; of a quantized GGUF file, the file itself."""
    if model.file_type is not None and model.file_type == variant.type:
        return model.source.location
    stem = model.name.replace("/", "-")
    if variant.format == "gguf":
        return f"{stem}-{variant.type}.gguf"
    group = f"-g{variant.group_size}" if variant.group_size and variant.group_size > 0 else ""
    method = "" if variant.method == "none" else f"-{variant.method}"
    return f"{stem}{method}-{variant.type}{group}"


def gptqmodel_script(model: ModelSpec, variant: Variant, extra: str) -> str:
    """A GPTQModel script (Python) that quantizes with samples of a text file."""
    bits = variant.type.removesuffix("bit")
    return "\n".join(
        (
            "# pip install gptqmodel",
            "from gptqmodel import GPTQModel, QuantizeConfig",
            f'samples = open("calibration.txt").read().split("\\n\\n")[:{CALIBRATION_SAMPLES}]',
            f"config = QuantizeConfig(bits={bits}, group_size={variant.group_size}, {extra})",
            f'model = GPTQModel.load("{weights_id(model)}", config)',
            "model.quantize(samples)",
            f'model.save("{artifact_name(model, variant)}")',
        )
    )


def vllm(model: ModelSpec, candidate: Candidate, quantization: str | None) -> dict[str, str]:
    """vLLM's server, its Python class, a transformers snippet, and TGI as a docker command."""
    placement = candidate.placement
    target = artifact_name(model, candidate.variant) if quantization else weights_id(model)
    serve = ["vllm serve", target, f"--max-model-len {placement.context}", f"--max-num-seqs {placement.sequences}"]
    if quantization:
        serve.append(f"--quantization {quantization}")
    if placement.tensor_parallel > 1:
        serve.append(f"--tensor-parallel-size {placement.tensor_parallel}")
    options = f', quantization="{quantization}"' if quantization else ""
    if placement.tensor_parallel > 1:
        options += f", tensor_parallel_size={placement.tensor_parallel}"
    python = "\n".join(
        (
            "from vllm import LLM",
            f'llm = LLM(model="{target}"{options}, max_model_len={placement.context})',
            'print(llm.generate("Hello")[0].outputs[0].text)',
        )
    )
    return {
        "serve": " ".join(serve),
        "python": python,
        "transformers": _transformers(target),
        "docker": _tgi(target, placement, quantization),
    }


def _transformers(target: str) -> str:
    """A checkpoint says itself how it is quantized; GPTQ and AWQ ones need gptqmodel beside transformers."""
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto", device_map="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{target}")',
            'inputs = tokenizer("Hello", return_tensors="pt").to(model.device)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
        )
    )


def _tgi(target: str, placement: Placement, quantization: str | None) -> str:
    quantize = f" --quantize {quantization}" if quantization else ""
    return (
        "docker run --gpus all -p 8080:80 -v $PWD:/data ghcr.io/huggingface/text-generation-inference:latest"
        f" --model-id {target if '/' in target else f'/data/{target}'}{quantize}"
        f" --max-total-tokens {placement.context} --num-shard {placement.tensor_parallel}"
    )


def bitsandbytes(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """Transformers with a BitsAndBytesConfig; there is no server that does better with it."""
    if candidate.variant.type == "int8":
        config = "BitsAndBytesConfig(load_in_8bit=True)"
    else:
        config = (
            f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{candidate.variant.type}", '
            "bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)"
        )
    load = "\n".join(
        (
            "import torch",
            "from transformers import AutoModelForCausalLM, BitsAndBytesConfig",
            f'model = AutoModelForCausalLM.from_pretrained("{weights_id(model)}", device_map="auto",',
            f"    quantization_config={config})",
        )
    )
    return {
        "quantize": f'{load}\nmodel.save_pretrained("{artifact_name(model, candidate.variant)}")',
        "serve": f"vllm serve {weights_id(model)} --quantization bitsandbytes"
        f" --max-model-len {candidate.placement.context}",
        "python": load,
    }


def llama_cpp(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """llama-quantize, llama-server, llama-cpp-python and an Ollama Modelfile with the plan's settings."""
    placement = candidate.placement
    target = artifact_name(model, candidate.variant)
    context = placement.context * placement.sequences
    serve = [f"llama-server -m {target} -c {context} -ngl {placement.gpu_layers} -ub {placement.ubatch}"]
    serve.append(f"-fa {'on' if placement.flash_attention else 'off'}")
    if placement.kv_type != "f16":
        serve.append(f"-ctk {placement.kv_type} -ctv {placement.kv_type}")
    if placement.sequences > 1:
        serve.append(f"-np {placement.sequences}")
    if placement.threads:
        serve.append(f"-t {placement.threads}")
    if placement.cpu_expert_layers:
        serve.append(f"--n-cpu-moe {placement.cpu_expert_layers}")
    if placement.tensor_split:
        serve.append(f"--tensor-split {','.join(f'{share:g}' for share in placement.tensor_split)}")
    return {
        "quantize": _llama_quantize(model, candidate.variant),
        "serve": " ".join(serve),
        "python": _llama_cpp_python(target, placement),
        "ollama": _ollama(target, placement),
    }


def _ollama(target: str, placement: Placement) -> str:
    """A Modelfile. Ollama has no option for experts or splits: it is left to place such a model by itself."""
    lines = [f"FROM {target if target.startswith('/') else f'./{target}'}", f"PARAMETER num_ctx {placement.context}"]
    if placement.cpu_expert_layers or placement.tensor_split:
        lines.append(
            "# no num_gpu: Ollama cannot keep experts in RAM or split unevenly, so it chooses the layers itself"
        )
    else:
        lines.append(f"PARAMETER num_gpu {placement.gpu_layers}")
    return "\n".join(lines)


def _llama_quantize(model: ModelSpec, variant: Variant) -> str:
    target = artifact_name(model, variant)
    if model.file_type is not None:
        return f"nothing to do: {target} is {variant.type}"
    if variant.type in {"F32", "F16", "BF16"}:
        return f"convert_hf_to_gguf.py {weights_id(model)} --outtype {variant.type.lower()} --outfile {target}"
    full = target.replace(variant.type, "f16")
    imatrix = "--imatrix imatrix.gguf " if variant.imatrix else ""
    convert = f"convert_hf_to_gguf.py {weights_id(model)} --outtype f16 --outfile {full}"
    return f"{convert}\nllama-quantize {imatrix}{full} {target} {variant.type}"


def _llama_cpp_python(target: str, placement: Placement) -> str:
    options = [f'model_path="{target}"', f"n_ctx={placement.context}", f"n_gpu_layers={placement.gpu_layers}"]
    options.append(f"flash_attn={placement.flash_attention}")
    if placement.threads:
        options.append(f"n_threads={placement.threads}")
    if placement.tensor_split:
        options.append(f"tensor_split=[{', '.join(f'{share:g}' for share in placement.tensor_split)}]")
    if placement.cpu_expert_layers:
        return (
            "# llama_cpp.Llama cannot keep experts in RAM: use llama-server above, or fewer n_gpu_layers here\n"
            "from llama_cpp import Llama"
        )
    return f'from llama_cpp import Llama\nllm = Llama({", ".join(options)})\nprint(llm("Hello", max_tokens=100))'
