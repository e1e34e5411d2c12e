"""Reading published traces, on small files of the same formats."""

import json

import numpy as np
import pytest

from scripts.bench.trace_files import (
    SHARES,
    Client,
    hashed_tiers,
    read_azure,
    read_mooncake,
    read_servegen,
    tiers_by_burstiness,
)

pytestmark = pytest.mark.unit


def test_azure_times_are_relative_and_in_order(tmp_path):
    path = tmp_path / "AzureLLMInferenceTrace_code.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:05.5000000,3180,8\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
    )
    read = read_azure(path)
    assert read.at == pytest.approx([0.0, 1.52004])
    assert read.prompt.tolist() == [4808, 3180]
    assert read.output.tolist() == [10, 8]


def test_mooncake_computes_only_blocks_that_nobody_had_before(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 2000, "input_length": 1300, "output_length": 7, "hash_ids": [0, 1, 9]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 4000, "input_length": 600, "output_length": 5, "hash_ids": [7, 0]},
    ]
    path = tmp_path / "conversation_trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_mooncake(path)
    assert read.at.tolist() == [0.0, 2.0, 3.0, 4.0]
    # The last one's first block is new, so what follows it is not a prefix anybody had.
    assert read.prompt.tolist() == [1100, 1300 - 2 * 512, 1, 600]
    assert read.context.tolist() == [1100, 1300, 1100, 600]
    assert read.client.tolist() == [1, 1, 1, 0]


def servegen(folder, number, rows, lengths=None):
    lines = [f"{index * 600},{rate},{cv},Gamma,1,1" if rate else f"{index * 600},0,0,,0,0"
             for index, (rate, cv) in enumerate(rows)]  # fmt: skip
    (folder / f"chunk-{number}-trace.csv").write_text("\n".join(lines) + "\n")
    if lengths is not None:
        both = {"input_tokens": str(lengths[0]), "output_tokens": str(lengths[1])}
        empty = {"input_tokens": "{}", "output_tokens": "{}"}
        text = json.dumps({"0": empty, "21600": both})
        (folder / f"chunk-{number}-dataset.json").write_text(text)


def test_servegen_clients_without_lengths_get_those_of_the_others(tmp_path):
    servegen(tmp_path, 0, [(2.0, 1.0), (0, 0)], ({100: 0.5, 200: 0.5}, {10: 1.0}))
    servegen(tmp_path, 5, [(4.0, 3.0), (4.0, 1.0)])
    servegen(tmp_path, 10, [(0, 0), (6.0, 1.0)], ({400: 1.0}, {40: 1.0}))
    first, unknown, last = read_servegen(tmp_path)
    assert [first.number, unknown.number, last.number] == [0, 5, 10]
    assert first.rate.tolist() == [2.0, 0.0]
    assert unknown.burstiness == 2.0
    assert set(first.lengths[:, 0]) == {100, 200}
    assert set(unknown.lengths[:, 0]) == {100, 200, 400}
    # Three of four requests with known lengths were the last client's.
    assert np.mean(unknown.lengths[:, 1] == 40) == pytest.approx(0.75, abs=0.1)


def test_a_folder_without_traces_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="chunk-N-trace"):
        read_servegen(tmp_path)


def test_hashed_tiers_have_the_stated_shares_and_stay_the_same():
    tiers = hashed_tiers(range(20_000))
    assert np.bincount(tiers) / 20_000 == pytest.approx(SHARES, abs=0.01)
    assert (tiers == hashed_tiers(range(20_000))).all()
    assert len(set(hashed_tiers([7] * 10))) == 1


def test_stable_clients_are_priority_and_bursty_ones_flex():
    clients = [
        Client(number, np.array([rate]), np.array([cv]), np.empty((0, 2)))
        for number, (rate, cv) in enumerate([(20.0, 9.0), (10.0, 1.0), (70.0, 2.0)])
    ]
    shares = tiers_by_burstiness(clients)
    assert shares[1] == pytest.approx([1.0, 0.0, 0.0])
    assert shares[0] == pytest.approx([0.0, 0.0, 1.0])
    # The one at the border is split.
    assert shares[2] == pytest.approx([0.0, 6 / 7, 1 / 7])
    rates = np.array([20.0, 10.0, 70.0])
    assert rates @ shares / 100 == pytest.approx(SHARES)
