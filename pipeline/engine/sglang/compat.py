"""Every symbol of SGLang that the engine adapter leans on, checked before an engine starts.

The same code runs with SGLang 0.5.17 and 0.5.21. The handshake has a list of its own: `handshake.compat`.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pipeline.engine.sglang.requests import FAKE_BOOTSTRAP_HOST
from pipeline.errors import EngineStartError

TRIED: Final = ("0.5.17", "0.5.21")


@dataclass(frozen=True)
class Symbol:
    """A name in a module of SGLang and, for a callable, parameters that it must take."""

    module: str
    name: str  # dotted below the module
    parameters: tuple[str, ...] | None = None
    value: str | None = None  # for a constant that is spelled out here


_ENGINE: Final = "sglang.srt.entrypoints.engine"
_MANAGER: Final = "sglang.srt.managers.tokenizer_manager"
_IO: Final = "sglang.srt.managers.io_struct"
_KV_EVENTS: Final = "sglang.srt.disaggregation.kv_events"
_KV_COMPONENT: Final = "sglang.srt.managers.scheduler_components.kv_events_publisher"
_TOOLS: Final = "sglang.srt.function_call.function_call_parser"
_DETECTOR: Final = "sglang.srt.function_call.base_format_detector"
SYMBOLS: Final = (
    Symbol(_ENGINE, "Engine.run_scheduler_process_func"),
    Symbol(_ENGINE, "Engine.run_detokenizer_process_func"),
    Symbol(_ENGINE, "Engine.get_all_child_pids", ("self",)),
    Symbol(_ENGINE, "Engine.shutdown", ("self",)),
    Symbol(_ENGINE, "run_data_parallel_controller_process"),
    Symbol(_ENGINE, "set_prometheus_multiproc_dir", ()),
    Symbol(_MANAGER, "TokenizerManager.generate_request", ("self", "obj", "request")),
    Symbol(_MANAGER, "TokenizerManager.freeze_gc", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.auto_create_handle_loop", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.handle_loop", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.get_loads", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.get_internal_state", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.flush_cache", ("self", "timeout_s")),
    Symbol(_MANAGER, "TokenizerManager.release_memory_occupation", ("self", "obj", "request")),
    Symbol(_MANAGER, "TokenizerManager.resume_memory_occupation", ("self", "obj", "request")),
    Symbol(_MANAGER, "TokenizerManager.update_weights_from_disk", ("self", "obj", "request")),
    Symbol(_MANAGER, "TokenizerManager.start_profile", ("self", "req")),
    Symbol(_MANAGER, "TokenizerManager.stop_profile", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.start_expert_distribution_record", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.stop_expert_distribution_record", ("self",)),
    Symbol(_MANAGER, "TokenizerManager.dump_expert_distribution_record", ("self",)),
    Symbol(_IO, "FlushCacheReqInput", ("timeout_s",)),
    Symbol(_IO, "FlushCacheReqOutput", ("success",)),
    Symbol(_IO, "ReleaseMemoryOccupationReqInput", ("tags",)),
    Symbol(_IO, "ResumeMemoryOccupationReqInput", ("tags",)),
    Symbol(_IO, "UpdateWeightFromDiskReqInput", ("model_path", "weight_version", "flush_cache")),
    Symbol(
        _IO,
        "ProfileReq",
        (
            "output_dir",
            "num_steps",
            "activities",
            "profile_by_stage",
            "with_stack",
            "record_shapes",
            "profile_id",
        ),
    ),
    Symbol("sglang.srt.environ", "envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"),
    Symbol("sglang.srt.configs.model_config", "ModelConfig.get_default_sampling_params", ("self",)),
    Symbol(
        "sglang.srt.managers.scheduler",
        "run_scheduler_process",
        ("server_args", "pipe_writer", "dp_rank", "pp_rank", "tp_rank"),
    ),
    Symbol("sglang.srt.managers.detokenizer_manager", "run_detokenizer_process", ("server_args", "port_args")),
    Symbol(
        "sglang.srt.managers.data_parallel_controller",
        "run_data_parallel_controller_process",
        ("server_args", "port_args", "pipe_writer", "run_scheduler_process_func"),
    ),
    Symbol(
        _IO,
        "GenerateReqInput",
        (
            "rid",
            "input_ids",
            "sampling_params",
            "stream",
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
            "return_text_in_logprobs",
            "bootstrap_host",
            "bootstrap_port",
            "bootstrap_room",
            "routed_dp_rank",
            "priority",
            "lora_path",
            "extra_key",
            "max_thinking_tokens",
            "require_reasoning",
        ),
    ),
    Symbol(_IO, "EmbeddingReqInput", ("rid", "input_ids", "dimensions")),
    Symbol(
        "sglang.srt.sampling.sampling_params",
        "SamplingParams",
        (
            "max_new_tokens",
            "min_new_tokens",
            "stop",
            "stop_token_ids",
            "ignore_eos",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "sampling_seed",
            "logit_bias",
            "json_schema",
            "regex",
            "ebnf",
            "skip_special_tokens",
            "no_stop_trim",
            "stream_interval",
            "structural_tag",
        ),
    ),
    Symbol("sglang.srt.disaggregation.utils", "FAKE_BOOTSTRAP_HOST", value=FAKE_BOOTSTRAP_HOST),
    Symbol("sglang.srt.managers.load_snapshot", "ShmLoadSnapshotReader", ("path",)),
    Symbol(
        "sglang.srt.managers.load_snapshot",
        "LoadSnapshot",
        (
            "num_running_reqs",
            "num_waiting_reqs",
            "num_waiting_uncached_tokens",
            "num_used_tokens",
            "max_total_num_tokens",
            "gen_throughput",
            "cache_hit_rate",
        ),
    ),
    Symbol(
        "sglang.srt.server_args",
        "ServerArgs",
        (
            "model_path",
            "tokenizer_path",
            "revision",
            "incremental_streaming_output",
            "enable_memory_saver",
            "enable_weights_cpu_backup",
            "expert_distribution_recorder_mode",
            "enable_priority_scheduling",
            "enable_strict_thinking",
            "reasoning_parser",
            "schedule_low_priority_values_first",
        ),
    ),
    Symbol("sglang.srt.server_args", "ServerArgs.add_cli_args", ("parser",)),
    Symbol("sglang.srt.plugins.hook_registry", "HookRegistry.register", ("target", "hook", "hook_type")),
    Symbol("sglang.srt.plugins.hook_registry", "HookType.REPLACE"),
    Symbol("sglang.srt.plugins.hook_registry", "HookType.BEFORE"),
    Symbol("sglang.srt.plugins.hook_registry", "HookType.AFTER"),
    Symbol("sglang.srt.plugins.hook_registry", "HookType.AROUND"),
    # What `cpu_platform.patch` hooks. SGLang only logs a hook that does not fit.
    Symbol("sglang.srt.mem_cache.pool_host.common", "_cuda_host_register", ("buffer",)),
    Symbol("sglang.srt.mem_cache.pool_host.common", "_cuda_host_unregister", ("buffer",)),
    Symbol(
        "sglang.srt.sampling.sampling_batch_info",
        "SamplingBatchInfo.from_schedule_batch",
        ("batch", "vocab_size"),
    ),
    Symbol("sglang.srt.layers.sampler", "sampling_from_probs_torch", ("probs", "sampling_seed", "positions")),
    Symbol(
        "sglang.srt.layers.sampler",
        "top_k_top_p_min_p_sampling_from_probs_torch",
        ("probs", "top_ks", "top_ps", "min_ps", "need_min_p_sampling", "sampling_seed", "positions"),
    ),
    Symbol("sglang.srt.disaggregation.nixl.conn", "NixlKVManager.__init__"),
    Symbol("sglang.srt.layers.pooler", "pool_hidden_states", ("pooling_type", "hidden_states", "forward_batch")),
    Symbol("sglang.srt.layers.pooler", "PoolingType.CLS"),
    Symbol("sglang.srt.layers.pooler", "PoolingType.LAST"),
    # KV events: `kv_events` and `kv_event_publisher`.
    Symbol(_KV_EVENTS, "EventPublisherFactory.register_publisher", ("name", "ctor")),
    Symbol(_KV_EVENTS, "EventPublisherFactory.create", ("config", "attn_dp_rank")),
    Symbol(_KV_EVENTS, "BlockStored", ("block_hashes", "parent_block_hash", "block_size", "medium")),
    Symbol(_KV_EVENTS, "BlockRemoved", ("block_hashes", "medium")),
    Symbol(_KV_EVENTS, "AllBlocksCleared"),
    Symbol(_KV_EVENTS, "EventBatch", ("events",)),
    Symbol(_KV_EVENTS, "StorageMedium.GPU"),
    Symbol(_KV_EVENTS, "StorageMedium.CPU"),
    Symbol(_KV_EVENTS, "StorageMedium.DISK"),
    Symbol(_KV_EVENTS, "StorageMedium.EXTERNAL"),
    Symbol(_KV_COMPONENT, "SchedulerKvEventsPublisher", ("tree_cache",)),
    Symbol(_KV_COMPONENT, "SchedulerKvEventsPublisher.init_kv_events", ("self", "kv_events_config")),
    Symbol(_KV_COMPONENT, "SchedulerKvEventsPublisher.emit_kv_metrics", ("self",)),
    Symbol(_KV_COMPONENT, "SchedulerKvEventsPublisher.publish_kv_events", ("self",)),
    Symbol("sglang.srt.managers.scheduler", "Scheduler.process_batch_result", ("self", "batch", "result")),
    # Tool calls and reasoning: `parsers`.
    Symbol(_TOOLS, "FunctionCallParser", ("tools", "tool_call_parser", "tokenizer")),
    Symbol(_TOOLS, "FunctionCallParser.parse_stream_chunk", ("self", "chunk_text")),
    Symbol(
        _TOOLS,
        "FunctionCallParser.get_structure_constraint",
        ("self", "tool_choice", "parallel_tool_calls", "thinking_mode"),
    ),
    Symbol(_DETECTOR, "BaseFormatDetector.supports_structural_tag", ("self",)),
    Symbol(_DETECTOR, "BaseFormatDetector.parses_required_natively", ("self",)),
    Symbol("sglang.srt.function_call.json_array_parser", "JsonArrayParser.parse_streaming_increment", ("self",)),
    Symbol(
        "sglang.srt.function_call.utils",
        "get_json_schema_constraint",
        ("tools", "tool_choice", "parallel_tool_calls"),
    ),
    Symbol(
        "sglang.srt.parser.reasoning_parser",
        "ReasoningParser",
        ("model_type", "stream_reasoning", "force_reasoning", "request", "tokenizer"),
    ),
    Symbol("sglang.srt.parser.reasoning_parser", "ReasoningParser.parse_stream_chunk", ("self", "chunk_text")),
    Symbol("sglang.srt.parser.reasoning_parser", "ReasoningParser.parse_stream_end", ("self",)),
    Symbol("sglang.srt.parser.template_manager", "TemplateManager.force_reasoning"),
    Symbol("sglang.srt.parser.template_manager", "TemplateManager.reasoning_config"),
    Symbol("sglang.srt.parser.template_manager", "TemplateManager.suggested_reasoning_parser"),
    Symbol("sglang.srt.parser.template_manager", "TemplateManager.suggested_tool_call_parser"),
    Symbol(
        "sglang.srt.parser.template_detection",
        "ReasoningToggleConfig",
        ("toggle_param", "default_enabled", "special_case"),
    ),
    Symbol("sglang.srt.function_call.core_types", "ToolCallItem", ("tool_index", "name", "parameters")),
    Symbol(
        "sglang.srt.entrypoints.openai.protocol",
        "ChatCompletionRequest",
        (
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "reasoning_effort",
            "separate_reasoning",
            "stream_reasoning",
            "chat_template_kwargs",
        ),
    ),
)

_SCHEDULER: Final = "sglang.srt.managers.scheduler"
_CHECK_DIMENSIONS: Final = "TokenizerManager._validate_for_matryoshka_dim"
TEXTS: Final = (
    Symbol(_ENGINE, "Engine.__init__"),
    Symbol(_MANAGER, _CHECK_DIMENSIONS),
    Symbol(_MANAGER, "TokenizerManager._validate_one_request"),
    Symbol(_ENGINE, "_set_envs_and_config"),
    Symbol(_MANAGER, "TokenizerManager.auto_create_handle_loop"),
    Symbol(_MANAGER, "TokenizerManager.init_running_status"),
    Symbol(_MANAGER, "TokenizerManager.init_ipc_channels"),
    Symbol(_MANAGER, "TokenizerManager.flush_cache"),
    Symbol(_SCHEDULER, "Scheduler.get_internal_state"),
    Symbol(_SCHEDULER, "Scheduler.init_kv_events_publisher"),
    Symbol(_KV_COMPONENT, "SchedulerKvEventsPublisher.init_kv_events"),
    Symbol(_KV_COMPONENT, "SchedulerKvEventsPublisher.publish_kv_events"),
    Symbol(_DETECTOR, "BaseFormatDetector.__init__"),
    Symbol("sglang.srt.parser.reasoning_parser", "BaseReasoningFormatDetector.__init__"),
    Symbol(_ENGINE, "init_tokenizer_manager"),
)
_LINES: Final = {
    "Engine.__init__": (
        "atexit.register(self.shutdown)",
        "self.tokenizer_manager = tokenizer_manager",
        "self.port_args = port_args",
        "self.send_to_rpc = ",
    ),
    _CHECK_DIMENSIONS: ("self.model_config.is_matryoshka", "self.model_config.matryoshka_dimensions"),
    "TokenizerManager._validate_one_request": (
        "isinstance(obj, EmbeddingReqInput) and self.is_generation",
        "if input_token_num >= self.context_len",
    ),
    "_set_envs_and_config": ("enable_metrics:\n        set_prometheus_multiproc_dir()",),
    "TokenizerManager.auto_create_handle_loop": ("if self.event_loop is not None:\n            return",),
    "TokenizerManager.init_running_status": ("self.event_loop = None", "self._subprocess_watchdog = None"),
    "TokenizerManager.init_ipc_channels": (
        "self.recv_from_detokenizer = ",
        "self.send_to_scheduler = ",
        "self.load_snapshot_reader = ",
    ),
    "TokenizerManager.flush_cache": ("await self.flush_cache_communicator(FlushCacheReqInput(timeout_s=timeout_s))",),
    "Scheduler.get_internal_state": (
        'ret["effective_max_running_requests_per_dp"] = self.max_running_requests',
        'ret["memory_usage"] = ',
        "token_capacity=self.max_total_num_tokens",
    ),
    "Scheduler.init_kv_events_publisher": ("self.kv_events_publisher = SchedulerKvEventsPublisher(",),
    "BaseFormatDetector.__init__": ("self.prev_tool_call_arr", "self.streamed_args_for_tool"),
    "BaseReasoningFormatDetector.__init__": ("self.reasoning_default = ",),
    "init_tokenizer_manager": ('!= "auto"',),
    "SchedulerKvEventsPublisher.init_kv_events": ("self.kv_event_publisher = EventPublisherFactory.create(",),
    "SchedulerKvEventsPublisher.publish_kv_events": (
        "events = self.tree_cache.take_events()",
        "self.kv_event_publisher.publish(batch)",
    ),
}
"""Text that must stand in these functions, where a name alone does not show how it is used."""


def differences(symbols: tuple[Symbol, ...] = SYMBOLS, texts: tuple[Symbol, ...] = TEXTS) -> Iterator[str]:
    """A phrase for each thing that the installed SGLang does not have as expected. Imports SGLang."""
    for module in dict.fromkeys(symbol.module for symbol in symbols + texts):
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield f"{module} cannot be imported: {error}"
            return  # the others would only repeat it
    for symbol in symbols:
        found = _find(symbol)
        if found is None:
            yield f"{symbol.module}.{symbol.name} is missing"
            continue
        if symbol.value not in (None, found):
            yield f"{symbol.module}.{symbol.name} is {found!r} and not {symbol.value!r}"
        has = inspect.signature(found).parameters if symbol.parameters else {}
        lacking = [name for name in symbol.parameters or () if name not in has]
        if lacking:
            yield f"{symbol.module}.{symbol.name} takes no {', '.join(lacking)}"
    for symbol in texts:
        found = _find(symbol)
        source = inspect.getsource(found) if found else ""
        for line in _LINES[symbol.name]:
            if line not in source:
                yield f"{symbol.module}.{symbol.name} no longer has `{line}`"


def check() -> None:
    """Raises EngineStartError with every difference."""
    if found := tuple(differences()):
        version = importlib.import_module("sglang").__version__
        raise EngineStartError(
            f"SGLang {version} does not fit this adapter (made for {' and '.join(TRIED)}): {'; '.join(found)}"
        )


def _find(symbol: Symbol) -> Any:
    """The thing itself; None where there is none."""
    try:
        return functools.reduce(getattr, symbol.name.split("."), importlib.import_module(symbol.module))
    except AttributeError:
        return None
