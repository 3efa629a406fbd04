"""SGLang by itself: reads prompts as JSON from standard input, prints what `Engine.generate` answers greedily.

echo '{"prompts": [[1, 2]], "max_new_tokens": 4}' | python tests/engine/reference.py
"""

import json
import sys
import threading

from pipeline.engine.sglang import launch
from pipeline.engine.sglang.series import Inlet
from pipeline.models import prepare_model


def main() -> None:
    asked = json.load(sys.stdin)
    engine = launch.launch(
        str(prepare_model(asked["model_path"])), asked["server_args"], threading.Event(), Inlet().outlet
    )
    greedy = {"temperature": 0, "max_new_tokens": asked["max_new_tokens"], "ignore_eos": asked.get("ignore_eos", False)}
    outputs = [engine.generate(input_ids=prompt, sampling_params=greedy) for prompt in asked["prompts"]]
    launch.end(engine)
    json.dump([output["output_ids"] for output in outputs], sys.stdout)


if __name__ == "__main__":
    main()
