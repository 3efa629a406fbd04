"""SGLang's own HTTP server, on this machine's CPU as the pipeline's engines run there.

python tests/interop/sglang_http.py PORT
"""

import sys

from pipeline.engine.sglang import cpu_platform

cpu_platform.prepare()  # before SGLang's import, here and in the processes that it spawns from this file

from pipeline.config import BUILTIN_MODEL  # noqa: E402
from pipeline.engine.sglang import server_args  # noqa: E402
from pipeline.models import prepare_model  # noqa: E402

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    arguments = server_args.resolve(str(prepare_model(BUILTIN_MODEL)), {"dtype": "float32"})
    arguments |= {"incremental_streaming_output": False, "enable_metrics": False}
    launch_server(ServerArgs(**arguments, port=int(sys.argv[1]), served_model_name="smollm2"))
