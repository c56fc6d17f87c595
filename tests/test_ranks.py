"""Who is who among several processes, and what they say to one another."""

from typing import Any

import pytest
import torch

from dfad import cli, compare, export, ranks, reproduce, train
from dfad.errors import ConfigurationError, RankError, RunFolderError
from dfad.ranks import Ranks, current_ranks
from tests.ranks import run_ranks


def test_the_way_to_the_store_is_the_one_that_was_checked():
    version = torch.__version__.split("+")[0].rpartition(".")[0]
    assert ranks.CHECKED_WITH[0] <= version <= ranks.CHECKED_WITH[1]
    assert callable(torch.distributed.distributed_c10d._get_default_store)


class TestShares:
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_a_reversed_share_is_the_share_of_the_reversed_batch(self, count):
        batch = torch.arange(24).view(8, 3)
        for rank in range(count):
            ranks = Ranks(rank, count)
            assert torch.equal(ranks.share(batch).flip(0), ranks.share(batch.flip(0)))

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_shares_are_the_batch(self, count, monkeypatch):
        batch = torch.arange(24).view(8, 3)
        shares = [Ranks(rank, count).share(batch) for rank in range(count)]
        monkeypatch.setattr(Ranks, "gather", lambda self, share: torch.stack(shares))
        assert torch.equal(Ranks(0, count).whole(shares[0]), batch)

    def test_a_batch_that_ranks_do_not_divide_is_refused(self):
        Ranks(0, 1).require_divides("batch_size", 7)
        with pytest.raises(ConfigurationError, match="batch_size is 50, and 4 ranks share it: .* of 8, .* Give 48"):
            Ranks(0, 4).require_divides("batch_size", 50)
        with pytest.raises(ConfigurationError, match="batch_size is 2, and 4 ranks share it: .* of 8, .* Give 8"):
            Ranks(0, 4).require_divides("batch_size", 2)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_time_limit_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv(ranks.TIME_LIMIT, text)
    with pytest.raises(ConfigurationError, match=f"{ranks.TIME_LIMIT} is '{text}'"):
        ranks.time_limit()


@pytest.mark.parametrize(
    ("rank", "count"), [(None, "2"), ("", "2"), ("1", None), ("2", "2"), ("-1", "2"), ("0", "two"), ("0", "0")]
)
def test_ranks_that_no_launcher_gives_are_refused(rank, count, monkeypatch, capsys):
    for name, value in {"RANK": rank, "WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: train.main(["--run_dir=run"]))
    assert stopped.value.code == ConfigurationError.exit_code
    assert f"RANK is {rank or ''!r} and WORLD_SIZE {count or ''!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "MASTER_ADDR is '' and MASTER_PORT ''"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR is 'localhost' and MASTER_PORT ''"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "free"}, "MASTER_PORT 'free'"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "65536"}, "MASTER_PORT '65536'"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "2", "LOCAL_RANK": "first"}, "LOCAL_RANK is 'first'"),
    ],
)
def test_ranks_that_cannot_find_one_another_by_the_environment_are_refused(variables, words, monkeypatch, capsys):
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: train.main(["--run_dir=run"]))
    assert stopped.value.code == ConfigurationError.exit_code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "count", "found"), [(None, None, (0, 1)), ("0", "1", (0, 1)), ("3", "4", (3, 4))])
def test_ranks_of_a_launcher(rank, count, found, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert ranks.launched() == found


@pytest.mark.parametrize(
    ("command", "given"),
    [(reproduce, ["digits", "--workers=2"]), (export, ["run"]), (compare, ["one", "two"])],
    ids=["reproduce", "export", "compare"],
)
def test_a_command_of_one_process_is_refused_by_several(command, given, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: command.main(given))
    assert stopped.value.code == ConfigurationError.exit_code
    assert "was started as 2 ranks, which would all do the same. Start one process" in capsys.readouterr().err


def refuse() -> None:
    raise RunFolderError("There is no room.")


def words() -> dict[str, Any]:
    own = current_ranks()
    found: dict[str, Any] = {"largest": own.largest(own.rank * 15), "all": own.all_of(own.rank)}
    found["of first"] = own.of_first(lambda: f"by rank {own.rank}")
    for name, call in {
        "refused by the first": lambda: own.of_first(refuse),
        "different": lambda: own.require_equal(seed=1, teacher=own.rank, **({"rounds": 1} if own.rank else {})),
    }.items():
        with pytest.raises((RunFolderError, ConfigurationError)) as error:
            call()
        found[name] = str(error.value)
    x = torch.full((3,), float(own.rank), requires_grad=True)
    (own.average(x) * (own.rank + 1)).sum().backward()
    found["gradient"] = x.grad
    own.require_equal(seed=1)
    found["capturable"] = own.capturable(torch.device("cuda"))
    return found


def test_ranks_speak_to_one_another(tmp_path):
    for found in run_ranks(2, words, tmp_path):
        assert found["largest"] == 15
        assert found["all"] == [0, 1]
        assert found["of first"] == "by rank 0"
        assert found["refused by the first"] == "There is no room."
        assert "Rank 1 of 2 has another teacher and another rounds than rank 0." in found["different"]
        assert torch.equal(found["gradient"], torch.full((3,), (1 + 2) / 2))  # of both ranks' losses
        assert not found["capturable"]  # by gloo


@pytest.mark.parametrize(("capturing", "error"), [(True, RuntimeError), (False, RankError)])
def test_a_collective_that_a_graph_cannot_hold_is_no_fault_of_another_rank(capturing, error, monkeypatch):
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(error, match="not permitted"):
        Ranks(0, 2).add(torch.ones(3))


@pytest.mark.parametrize(("backends", "expected"), [("cpu:gloo,cuda:nccl", True), ("cpu:gloo,cuda:gloo", False)])
def test_a_graph_holds_collectives_by_nccl_alone(backends, expected, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    assert Ranks(0, 2).capturable(torch.device("cuda")) is expected
    assert Ranks().capturable(torch.device("cuda"))


def silent() -> str:
    own = current_ranks()
    ranks.GRACE = 0.5
    if not own.first:
        assert own.heard("named", within=60)
        return ""
    with pytest.raises(RankError) as error:
        own.largest(1)
    own.leave_word("named")
    return str(error.value)


def test_a_rank_that_hangs_is_named(tmp_path):
    message, _ = run_ranks(2, silent, tmp_path, time_limit=1)
    assert message.startswith("Rank 1 of 2 took no part any more")
