"""What operators have SGLang do, guarded: SGLang's schedulers die of most operations that do not fit their state.

An assertion or an unknown folder in a scheduler ends the engine and every request with it. So each operation is
checked here first, from what the scheduler says of itself and from what was done before.
"""

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from pipeline.engine.sglang import weights
from pipeline.errors import Busy, EngineFailed, InvalidRequest, NotSupported
from pipeline.operations import Arguments, ReleaseMemory, ResumeMemory, StartProfile, UpdateWeights, WithIdleEngine

FLUSH_S_MAX: Final = 10.0
"""Aborted requests, and a health check's, leave the scheduler within this time."""
PROFILES_DEFAULT: Final = ("SGLANG_TORCH_PROFILER_DIR", "/tmp")
MEMORY_KINDS: Final = ("kv_cache", "weights", "cuda_graph")
ALONE: Final = ("release_memory", "update_weights")
"""SGLang dies of a request that comes in the midst of these; a health check's may, though the worker is paused."""
SECRET: Final = ("api_key", "password", "token", "secret")
"""Settings with such a word at the end of their names, or before `_file`, are not shown."""


class Operations:
    """The operations of one started engine. One at a time; its caller sees to that."""

    def __init__(self, manager: Any, folder: str) -> None:
        """`manager`: SGLang's TokenizerManager. `folder`: where the present weights came from."""
        self._manager, self._folder = manager, folder
        self._released: set[str] = set()  # kinds of memory
        self._without_weights = False  # their memory is back, but not what was in it
        self._profile: _Profile | None = None  # the one that was started last and not yet stopped
        self._recording = False
        self._doing = ""
        self._by_name: dict[str, Callable[[Any], Awaitable[dict[str, Any]]]] = {
            "server_info": self._server_info,
            "flush_cache": self._flush_cache,
            "release_memory": self._release_memory,
            "resume_memory": self._resume_memory,
            "update_weights": self._update_weights,
            "start_profile": self._start_profile,
            "stop_profile": self._stop_profile,
            "start_expert_distribution": self._start_expert_distribution,
            "stop_expert_distribution": self._stop_expert_distribution,
            "dump_expert_distribution": self._dump_expert_distribution,
        }

    @property
    def suspended(self) -> str | None:
        """See `Engine.suspended`."""
        if self._doing in ALONE:
            return f"{self._doing} is under way"
        return self._lasting()

    def _lasting(self) -> str | None:
        """Why it is suspended until an operator ends that."""
        if self._released:
            return f"its {', '.join(sorted(self._released))} memory is released: resume_memory brings it back"
        if self._without_weights:
            return "its weights were released and not kept: update_weights loads them again"
        return None

    async def run(self, operation: str, arguments: Arguments) -> dict[str, Any]:
        """See `Engine.control`."""
        if operation not in self._by_name:
            raise NotSupported(f"SGLang cannot {operation}")
        self._doing = operation
        try:
            return await self._by_name[operation](arguments)
        finally:
            self._doing = ""

    async def _state(self) -> Mapping[str, Any]:
        """The first data-parallel rank's settings and capacities."""
        (state, *_) = await self._manager.get_internal_state()
        return state

    async def _server_info(self, arguments: Arguments) -> dict[str, Any]:
        state = await self._state()
        shown = {name: value for name, value in sorted(state.items()) if name[0] != "_" and not _is_secret(name)}
        return msgspec.json.decode(msgspec.json.encode(shown, enc_hook=str))

    # --- what needs an idle engine ----------------------------------------------------------------------

    async def _flush_cache(self, arguments: WithIdleEngine) -> dict[str, Any]:
        if self._released:
            raise Busy("the cache was flushed when its memory was released")
        await self._flush()
        return {"flushed": True}

    async def _flush(self) -> None:
        """Empty the cache, which also proves that the schedulers hold no request. Raises Busy where they do."""
        from sglang.srt.managers.io_struct import FlushCacheReqInput

        await self._manager.flush_cache(timeout_s=FLUSH_S_MAX)  # tells of the first data-parallel rank alone
        ranks = await self._manager.flush_cache_communicator(FlushCacheReqInput(timeout_s=None))
        if not all(rank.success for rank in ranks):
            raise Busy(f"SGLang still works on a request after {FLUSH_S_MAX:g} s")

    async def _release_memory(self, arguments: ReleaseMemory) -> dict[str, Any]:
        state = await self._state()
        if not state["enable_memory_saver"]:
            raise NotSupported(
                "the engine cannot give memory free: start it with --enable-memory-saver (and with "
                "--enable-weights-cpu-backup, if its weights are to come back by themselves)"
            )
        kinds = set(arguments.kinds or MEMORY_KINDS)
        if "kv_cache" in kinds and state["disaggregation_mode"] != "null":
            raise NotSupported(
                "the KV cache of a disaggregated engine stays registered with NIXL, so it cannot be given free: "
                "release its weights alone with kinds=weights"
            )
        if again := kinds & self._released:
            raise Busy(f"{', '.join(sorted(again))}: released already; resume_memory brings it back")
        if self._without_weights and "weights" in kinds:
            raise Busy("the weights are gone already: update_weights loads them again")
        if not self._released:
            await self._flush()
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        self._released |= kinds
        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=sorted(kinds)), None)
        return {"released": sorted(self._released), "weights_kept": bool(state["enable_weights_cpu_backup"])}

    async def _resume_memory(self, arguments: ResumeMemory) -> dict[str, Any]:
        kinds = set(arguments.kinds or self._released)
        if missing := kinds - self._released:
            raise Busy(f"{', '.join(sorted(missing))}: not released, so there is nothing to resume")
        if not kinds:
            raise Busy("no memory is released, so there is nothing to resume")
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        state = await self._state()
        await self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=sorted(kinds)), None)
        self._released -= kinds
        if "weights" in kinds and not state["enable_weights_cpu_backup"]:
            self._without_weights = True
        return {"resumed": sorted(kinds), "released": sorted(self._released), "next": self._lasting()}

    async def _update_weights(self, arguments: UpdateWeights) -> dict[str, Any]:
        """SGLang would roll back to the same broken folder, and die of it: so the folder is looked at first."""
        if "weights" in self._released:
            raise Busy(f"update_weights: {self._lasting()}")
        await weights.check(self._folder, arguments.model_path)
        await self._flush()
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        started_s = time.monotonic()
        request = UpdateWeightFromDiskReqInput(
            model_path=arguments.model_path, weight_version=arguments.weight_version, flush_cache=True
        )
        success, message, _ = await self._manager.update_weights_from_disk(request, None)
        if not success:
            raise EngineFailed(f"SGLang did not take the weights of {arguments.model_path}: {message}")
        self._folder, self._without_weights = arguments.model_path, False
        return {
            "model_path": arguments.model_path,
            "weight_version": arguments.weight_version,
            "duration_s": round(time.monotonic() - started_s, 3),
        }

    # --- profiles ---------------------------------------------------------------------------------------

    async def _start_profile(self, arguments: StartProfile) -> dict[str, Any]:
        if self._profile is not None and not self._profile.ended_by_itself:
            raise Busy("a profile is being recorded: stop_profile ends it")
        if arguments.by_stage and arguments.num_steps is None:
            raise InvalidRequest("num_steps: start_profile by_stage needs it", field="num_steps")
        folder = Path(arguments.output_dir or os.environ.get(*PROFILES_DEFAULT))
        _make_writable(folder, "output_dir")
        from sglang.srt.managers.io_struct import ProfileReq

        profile = _Profile(folder, f"{time.time():.6f}", arguments.num_steps)
        request = ProfileReq(
            output_dir=str(folder),
            num_steps=arguments.num_steps,
            activities=list(arguments.activities) or None,
            profile_by_stage=arguments.by_stage,
            with_stack=arguments.with_stack,
            record_shapes=arguments.record_shapes,
            profile_id=profile.id,
        )
        try:
            await self._manager.start_profile(request)
        except RuntimeError as error:  # SGLang's word for "no"
            raise EngineFailed(f"SGLang did not start the profile: {error}") from None
        self._profile = profile
        until = f"after {arguments.num_steps} steps" if arguments.num_steps else "at stop_profile"
        return {"output_dir": str(folder), "profile_id": profile.id, "ends": until}

    async def _stop_profile(self, arguments: Arguments) -> dict[str, Any]:
        if self._profile is None:
            raise Busy("no profile is being recorded: start_profile begins one")
        profile = self._profile
        if not profile.ended_by_itself:
            try:
                await self._manager.stop_profile()
            except RuntimeError as error:
                if not profile.files():
                    raise EngineFailed(f"SGLang did not stop the profile: {error}") from None
        self._profile = None
        return {"files": profile.files()}

    # --- which experts the tokens go to -----------------------------------------------------------------

    async def _recorder(self) -> str:
        """The recorder's mode. Raises NotSupported where it is off: SGLang would die of being asked."""
        mode = (await self._state())["expert_distribution_recorder_mode"]
        if mode is None:
            raise NotSupported(
                "the expert distribution recorder is off: start the engine of a mixture-of-experts model with "
                "--expert-distribution-recorder-mode stat (or per_pass, per_token, stat_approx)"
            )
        return mode

    async def _start_expert_distribution(self, arguments: Arguments) -> dict[str, Any]:
        mode = await self._recorder()
        if self._recording:
            raise Busy("it is being recorded: to begin anew would forget what was counted; stop or dump it first")
        await self._manager.start_expert_distribution_record()
        self._recording = True
        return {"recording": True, "mode": mode}

    async def _stop_expert_distribution(self, arguments: Arguments) -> dict[str, Any]:
        mode = await self._recorder()
        if not self._recording:
            raise Busy("it is not being recorded: start_expert_distribution begins that")
        await self._manager.stop_expert_distribution_record()
        self._recording = False
        return {"recording": False, "mode": mode}

    async def _dump_expert_distribution(self, arguments: Arguments) -> dict[str, Any]:
        from sglang.srt.environ import envs

        mode = await self._recorder()
        folder = Path(envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.get())
        _make_writable(folder, "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR")
        before = _files(folder, "expert_distribution_recorder_*")
        await self._manager.dump_expert_distribution_record()
        files = sorted(set(_files(folder, "expert_distribution_recorder_*")) - set(before))
        if not files:
            raise EngineFailed(f"SGLang wrote no file into {folder}; its log says why")
        return {"files": files, "mode": mode, "recording": self._recording}


class _Profile:
    """A recording: where its files are to be, and whether it ends by itself."""

    def __init__(self, folder: Path, profile_id: str, num_steps: int | None) -> None:
        self.id, self._folder, self._num_steps = profile_id, folder, num_steps

    def files(self) -> list[str]:
        return _files(self._folder, f"*{self.id}*")

    @property
    def ended_by_itself(self) -> bool:
        """SGLang writes the file at the end, and takes the next command only after that."""
        return self._num_steps is not None and bool(self.files())


def _files(folder: Path, pattern: str) -> list[str]:
    return sorted(str(file) for file in folder.glob(pattern))


def _make_writable(folder: Path, field: str) -> None:
    """Make the folder. Raises InvalidRequest where nothing can be written: SGLang would die of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{field}: {folder} cannot be made: {error.strerror}", field=field) from None
    if not os.access(folder, os.W_OK):
        raise InvalidRequest(f"{field}: {folder} cannot be written to", field=field)


def _is_secret(name: str) -> bool:
    return name.removesuffix("_file").endswith(SECRET)
