"""SGLang's vectors against those that transformers computes from the same weights, input by input."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from tiny_encoders import CONTEXT_TOKENS, DIMENSIONS, VOCAB_TOKENS, make_bert, make_qwen2

from pipeline.config import BUILTIN_MODEL, WorkerSettings
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import EmbeddingBatch, EngineInfo
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.errors import InvalidRequest
from pipeline.models import prepare_model
from subjects.codec import TokenIds, Vector
from subjects.messages import Embedding

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
COSINE_MIN = 0.999
LENGTHS = (1, 3, 40, 40, 200, 7)


def inputs(seed: int) -> tuple[TokenIds, ...]:
    """Some that begin alike, and one twice: what a prefix cache would mix up."""
    random = Random(seed)
    common = [random.randrange(3, VOCAB_TOKENS) for _ in range(max(LENGTHS))]
    drawn = [TokenIds.of([*common[: length - 1], random.randrange(3, VOCAB_TOKENS)]) for length in LENGTHS]
    return (*drawn, drawn[2])


def cosine(one: list[float], other: list[float]) -> float:
    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    return dot(one, other) / (dot(one, one) * dot(other, other)) ** 0.5


@pytest.fixture(scope="module", params=["bert", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make = {"bert": make_bert, "qwen2": make_qwen2}[request.param]
    make(folder, prepare_model(BUILTIN_MODEL))
    yield request.param, folder


def reference(kind: str, folder: Path, tokens: TokenIds) -> list[float]:
    """By transformers in float32: the mean of a BERT's states, the last of a Qwen2's; not normalized."""
    import torch
    from transformers import AutoModel

    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(torch.tensor([tokens.tolist()])).last_hidden_state[0]
    return (states.mean(dim=0) if kind == "bert" else states[-1]).tolist()


async def test_vectors_are_those_of_transformers(model: tuple[str, Path]):
    """One start for all that can be seen of a model."""
    kind, folder = model
    settings = WorkerSettings(role="embed", worker="e", model="m", model_path=str(folder))
    engine = build_engine(settings, "i")
    assert isinstance(engine, SglangEngine)
    try:
        info = await engine.start()
        await engine.warm_up()
        await _check_vectors(engine, kind, folder)
        await _check_limits(engine, kind, info)
        await _check_cancel(engine)
        canary = [output async for output in engine.generate(engine.canary(0))]
        assert [output.finish_reason for output in canary] == ["stop"]
    finally:
        await engine.close()


async def _check_vectors(engine: SglangEngine, kind: str, folder: Path) -> None:
    together = await engine.embed(EmbeddingBatch(rid="together", inputs=inputs(1)))
    again = await engine.embed(EmbeddingBatch(rid="again", inputs=inputs(1)))
    for tokens, *vectors in zip(inputs(1), together, again, strict=True):
        wanted = reference(kind, folder, tokens)
        for vector in vectors:
            assert len(vector) == DIMENSIONS and isinstance(vector, Vector)
            assert sum(number**2 for number in vector) == pytest.approx(1, abs=1e-4)
            assert cosine(vector.tolist(), wanted) > COSINE_MIN, len(tokens)
    assert max(cosine(together[0].tolist(), other.tolist()) for other in together[1:]) < COSINE_MIN, "all are alike"


async def _check_limits(engine: SglangEngine, kind: str, info: EngineInfo) -> None:
    tokens = inputs(2)[2]
    with pytest.raises(InvalidRequest, match="longer than"):
        await engine.embed(EmbeddingBatch(rid="long", inputs=(tokens, TokenIds.of([5] * CONTEXT_TOKENS))))
    if kind == "bert":
        assert info.embedding == Embedding(dimensions=DIMENSIONS)
        with pytest.raises(InvalidRequest, match="matryoshka"):
            await engine.embed(EmbeddingBatch(rid="cut", inputs=(tokens,), dimensions=16))
        return
    assert info.embedding == Embedding(dimensions=DIMENSIONS, matryoshka=True, matryoshka_dimensions=(16, 32))
    (whole,), (cut,) = [
        await engine.embed(EmbeddingBatch(rid=f"cut-{dimensions}", inputs=(tokens,), dimensions=dimensions))
        for dimensions in (None, 16)
    ]
    assert len(cut) == 16 and cosine(cut.tolist(), whole.tolist()[:16]) > COSINE_MIN
    assert sum(number**2 for number in cut) == pytest.approx(1, abs=1e-4)


async def _check_cancel(engine: SglangEngine) -> None:
    """What is taken back leaves nothing behind in SGLang, and the next one is served."""
    embedding = asyncio.create_task(engine.embed(EmbeddingBatch(rid="left", inputs=inputs(3) * 20)))
    await asyncio.sleep(0)  # it is in SGLang
    assert engine.vitals().running
    embedding.cancel()
    await asyncio.gather(embedding, return_exceptions=True)
    assert embedding.cancelled() and engine.vitals().running == 0
    assert len(await engine.embed(EmbeddingBatch(rid="next", inputs=inputs(3)))) == len(inputs(3))
    assert engine.vitals().running == 0
