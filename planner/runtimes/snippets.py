"""Python that loads an artifact with a plan's settings, for a person to paste."""

from __future__ import annotations

from planner.formats import ggml
from planner.runtimes.service import Service


def python(service: Service) -> str:
    """The class of the service's runtime."""
    made = {"llama.cpp": llama_cpp, "vllm": vllm, "transformers": transformers}
    return made[service.variant.runtime](service)


def llama_cpp(service: Service) -> str:
    """``llama_cpp.Llama``, which has one sequence and cannot keep experts in RAM."""
    placement = service.placement
    options = [f"model_path={service.target!r}", f"n_ctx={placement.context}", f"n_gpu_layers={placement.gpu_layers}"]
    options += [f"n_ubatch={placement.ubatch}", f"flash_attn={placement.flash_attention}"]
    if placement.threads:
        options.append(f"n_threads={placement.threads}")
    if placement.kv_type != "f16":
        type_id = ggml.type_traits(placement.kv_type.upper()).id
        options += [f"type_k={type_id}", f"type_v={type_id}"]
    if placement.tensor_split:
        options.append(f"tensor_split=[{', '.join(f'{share:g}' for share in placement.tensor_split)}]")
    lines = ["from llama_cpp import Llama"]
    if placement.cpu_expert_layers:
        return "# llama_cpp.Llama cannot keep experts in RAM: use llama-server, or fewer n_gpu_layers here\n" + lines[0]
    if not service.repack:
        lines.insert(0, "import llama_cpp")
        lines += [
            "defaults = llama_cpp.llama_cpp.llama_model_default_params",
            "def without_repacking():  # this machine faults on llama.cpp's repacked weights",
            "    parameters = defaults()",
            "    parameters.use_extra_bufts = False",
            "    return parameters",
            "llama_cpp.llama_cpp.llama_model_default_params = without_repacking",
        ]
    lines += [f"llm = Llama({', '.join(options)})", 'print(llm("Hello", max_tokens=100))']
    return "\n".join(lines)


def vllm(service: Service) -> str:
    """``vllm.LLM``."""
    placement = service.placement
    options = [f"model={service.target!r}", f"max_model_len={placement.context}"]
    if quantization := service.argument("quantization"):
        options.append(f"quantization={quantization!r}")
    if placement.tensor_parallel > 1:
        options.append(f"tensor_parallel_size={placement.tensor_parallel}")
    return "\n".join(
        (
            "from vllm import LLM",
            f"llm = LLM({', '.join(options)})",
            'print(llm.generate("Hello")[0].outputs[0].text)',
        )
    )


def transformers(service: Service) -> str:
    """transformers. A checkpoint says itself how it is quantized; GPTQ and AWQ need gptqmodel beside transformers."""
    config = bitsandbytes_config(service)
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    options = 'dtype="auto", device_map="auto"'
    if config:
        imports = f"import torch\n{imports}, BitsAndBytesConfig"
        options = f'device_map="auto", quantization_config={config}'
    return "\n".join(
        (
            imports,
            f"model = AutoModelForCausalLM.from_pretrained({service.target!r}, {options})",
            f"tokenizer = AutoTokenizer.from_pretrained({service.target!r})",
            'inputs = tokenizer("Hello", return_tensors="pt").to(model.device)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
        )
    )


def bitsandbytes_config(service: Service) -> str:
    """The configuration that quantizes while loading; empty for other methods."""
    if service.variant.method != "bitsandbytes":
        return ""
    if service.variant.type == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return (
        f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={service.variant.type!r}, "
        f"bnb_4bit_compute_dtype=torch.{service.variant.compute_dtype or 'bfloat16'}, "
        f"bnb_4bit_use_double_quant={service.variant.double_quantization})"
    )
