"""A run's student in the formats that others read: what is written gives what the student gives, or nothing is left."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dfad import cli, export
from dfad.config import TeacherConfig
from dfad.data import DataConfig, open_dataset
from dfad.delivery import images as image_files
from dfad.delivery import int8, onnx, program, safetensors
from dfad.delivery import timm as timm_folder
from dfad.delivery.card import model_card
from dfad.delivery.classifier import Delivery
from dfad.delivery.export import default_formats
from dfad.errors import ExportError, ModelError
from dfad.models.model_file import load_model
from dfad.models.sources import load
from dfad.presets import TrainConfig
from tests.delivery.conftest import distil

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))

needs_onnx = pytest.mark.skipif(bool(onnx.missing()), reason=onnx.missing())
needs_torchao = pytest.mark.skipif(bool(int8.missing()), reason=int8.missing())


def logits_of(file: Path) -> torch.Tensor:
    network, _ = load_model(file)
    with torch.no_grad():
        return network(IMAGES).logits


@pytest.fixture
def call(tmp_path, capsys):
    """Exports into a new folder; returns exit code, what was printed, and the folder."""

    def called(run: Path, *arguments: object, output: Path | None = None) -> tuple[int, str, Path]:
        folder = output or tmp_path / "exported"
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: export.main([str(run), f"--output={folder}", *map(str, arguments)]))
        captured = capsys.readouterr()
        return ended.value.code or 0, " ".join((captured.out + captured.err).split()), folder

    return called


def test_without_options_all_is_written_that_the_machine_allows(run, call):
    code, printed, folder = call(run, "--json")
    assert code == 0, printed
    expected = {"safetensors", "program", "huggingface"} | ({"onnx"} if not onnx.missing() else set())
    record = json.loads((folder / "export.json").read_text())
    assert set(record["parts"]) == expected
    assert all(part["difference"] <= 1e-4 * max(1, part["of"]) for part in record["parts"].values())
    assert {path.name for path in folder.iterdir()} == {part["path"] for part in record["parts"].values()} | {
        "export.json"
    }
    wanted = logits_of(run / "student_best.safetensors")
    assert torch.equal(logits_of(folder / "student.safetensors"), wanted)
    torch.testing.assert_close(torch.export.load(folder / "student.pt2").module()(IMAGES), wanted)
    assert load(str(folder / "student.pt2")).images.mean == tuple(load_model(run / "student.safetensors")[1]["mean"])
    if not onnx.missing():
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "student.onnx")
        (found,) = session.run(None, {"images": IMAGES.numpy()})
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_last_student_is_exported_where_it_is_asked_for(run, call):
    _, _, folder = call(run, "--formats", "safetensors", "--weights", "last")
    assert torch.equal(logits_of(folder / "student.safetensors"), logits_of(run / "student.safetensors"))


def test_a_built_in_normalisation_takes_pixels(run, call):
    _, manifest = load_model(run / "student.safetensors")
    formats = ["safetensors", "program", "huggingface"] + ["onnx"] * (not onnx.missing())
    code, printed, folder = call(run, "--formats", *formats, "--normalise")
    assert code == 0, printed
    pixels = IMAGES * manifest["std"][0] + manifest["mean"][0]
    wanted = logits_of(run / "student_best.safetensors")
    torch.testing.assert_close(torch.export.load(folder / "student.pt2").module()(pixels), wanted, rtol=1e-4, atol=1e-4)
    assert load(str(folder / "student.pt2")).images.mean == (0,)
    found = safetensors.read(folder / "student.safetensors")(pixels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    unknown = {name: value for name, value in manifest.items() if name not in ("mean", "std")}
    with pytest.raises(ModelError, match=r"does not contain it.*leave out --normalise"):
        Delivery(load_model(run / "student.safetensors")[0], unknown, normalise=True)


@pytest.mark.parametrize(("shift", "word"), [(1e-2, "differ by up to 0.01"), (float("nan"), "returns NaN")])
def test_what_differs_fails_and_leaves_nothing(shift, word, run, call, monkeypatch, tmp_path):
    def shifted(path: Path):
        function = torch.export.load(path).module()
        return lambda images: function(images) + shift

    monkeypatch.setattr(program, "read", shifted)
    code, printed, folder = call(run, "--formats", "program")
    assert code == 7
    assert word in printed
    assert "Nothing was kept." in printed
    assert list(tmp_path.iterdir()) == []
    call(run, "--formats", "safetensors")
    before = (folder / "export.json").read_bytes()
    assert call(run, "--formats", "safetensors", "program", "--overwrite")[0] == 7
    assert (folder / "export.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_larger_tolerance_lets_it_pass(run, call, monkeypatch):
    read = program.read
    monkeypatch.setattr(program, "read", lambda path: lambda images: read(path)(images) + 1e-2)
    assert call(run, "--formats", "program", "--tolerance", 0.1)[0] == 0


def test_a_student_that_no_program_can_be_made_of(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("branching") / "run"
    run = distil(folder, "--no_fused", factory="tests.delivery.conftest:Branching", kwargs="{}")
    code, printed, _ = call(run, "--formats", "program")
    assert code == 7
    assert "torch.export cannot make a program of the student" in printed
    assert call(run, "--formats", "safetensors", "huggingface")[0] == 0


def test_taps_serve_training_alone(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tapped") / "run"
    run = distil(
        folder, "--student.taps", "stages.0", "stages.1", factory="tests.delivery.conftest:Logits", kwargs="{}"
    )
    assert len(load_model(run / "student.safetensors")[0](IMAGES).taps) == 2
    code, printed, folder = call(run, "--formats", "program", "safetensors")
    assert code == 0, printed
    wanted = logits_of(run / "student_best.safetensors")
    torch.testing.assert_close(torch.export.load(folder / "student.pt2").module()(IMAGES), wanted)


def test_a_folder_that_exists_and_a_run_that_is_not_finished_are_refused(run, call, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    code, printed, _ = call(run, output=taken)
    assert (code, list(taken.iterdir())) == (4, [])
    assert "already exists. Replace it with --overwrite" in printed
    (taken / "thesis.txt").write_text("mine")
    code, printed, _ = call(run, "--overwrite", output=taken)
    assert (code, (taken / "thesis.txt").read_text()) == (4, "mine")
    assert "holds files that are not an export's. Choose another --output." in printed
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    code, printed, _ = call(unfinished)
    assert code == 3
    assert f"Finish it with --resume {unfinished}" in printed
    assert call(tmp_path / "nowhere")[0] == 2


def test_packages_that_are_missing_are_named(run, call, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    for name, extra in (("onnx", "onnx"), ("int8", "quantize")):
        code, printed, folder = call(run, "--formats", name)
        assert (code, folder.exists()) == (2, False)
        assert f"pip install 'dfad[{extra}]'" in printed
    code, printed, folder = call(run)
    assert code == 0
    assert "No ONNX is written: onnx is not installed." in printed


def test_the_model_card_names_images_that_were_not_generated(run):
    network, manifest = load_model(run / "student.safetensors")
    settings = {"method": {"random_fields": {"share": 0.75}}}
    assert "to agree with its teacher. The" in model_card(Delivery(network, manifest), "Load it.")
    card = model_card(Delivery(network, manifest, about={"config": settings}), "Load it.")
    assert "but for 75% of them, which were strokes and blobs drawn at random. The" in " ".join(card.split())


class TestEightBits:
    @needs_torchao
    def test_it_is_measured_beside_the_student(self, run, call):
        code, printed, folder = call(run, "--formats", "program", "int8", "--calibration", 64, "--json")
        assert code == 0, printed
        record = json.loads((folder / "export.json").read_text())
        assert set(record["parts"]) == {"program", "int8"} | ({"int8 in ONNX"} if not onnx.missing() else set())
        measured = record["int8"]
        assert measured["same_class"] > 0.9
        assert abs(measured["before"]["agreement"] - measured["after"]["agreement"]) < 0.1
        assert abs(measured["before"]["accuracy"] - measured["after"]["accuracy"]) < 0.1
        wanted = logits_of(run / "student_best.safetensors")
        found = int8.read(folder / "student-int8.pt2")(IMAGES)
        gap = (found - wanted).abs().mean()
        assert 0 < gap < 0.2 * wanted.std()  # it is another network, and near
        stored = torch.export.load(folder / "student-int8.pt2").state_dict
        assert any(tensor.dtype == torch.int8 for tensor in stored.values())

    @needs_torchao
    @needs_onnx
    def test_an_onnx_file_that_is_another_network_is_refused(self, run, call, monkeypatch):
        monkeypatch.setattr(onnx, "read", lambda path: lambda images: torch.randn(len(images), 10) * 10)
        code, printed, folder = call(run, "--formats", "int8", "--calibration", 64)
        assert (code, folder.exists()) == (7, False)
        assert "The results of the 8-bit network in ONNX differ from the 8-bit program's" in printed


class TestImages:
    def test_shards_are_a_data_set_with_the_teachers_labels(self, run, call):
        code, printed, folder = call(run, "--formats", "safetensors", "--images", 150, "--shard_size", 60)
        assert code == 0, printed
        shards = sorted(path.name for path in (folder / "images").glob("*.tar"))
        assert shards == ["images-000000.tar", "images-000001.tar", "images-000002.tar"]
        with tarfile.open(folder / "images" / shards[2]) as tar:
            assert tar.getnames()[:3] == ["00000120.png", "00000120.cls", "00000120.soft.npy"]
            assert len(tar.getnames()) == 90
        read = open_dataset(DataConfig("webdataset", folder / "images", test_fraction=0.2, image_size=8))
        assert len(read.train) + len(read.test) == 150
        assert read.image_shape == (1, 8, 8)

    def test_a_folder_holds_the_same_images(self, run, call, tmp_path):
        shards = call(run, "--formats", "safetensors", "--images", 20)[2] / "images"
        code, printed, other = call(
            run, "--formats", "safetensors", "--images", 20, "--images_as", "folder", output=tmp_path / "folders"
        )
        assert code == 0, printed
        one, two = (
            {png: (label, soft.tolist()) for png, label, soft in read(folder)}
            for read, folder in (
                (image_files._read_shards, shards),
                (image_files._read_folders, other / "images"),
            )
        )
        assert one == two
        size = sum(file.stat().st_size for file in (other / "images").rglob("*") if file.is_file())
        assert json.loads((other / "export.json").read_text())["parts"]["images"]["bytes"] == size
        assert (other / "images" / "files.txt").read_text().count("\n") == 20

    def test_reading_back_finds_what_is_wrong(self, run, tmp_path):
        generator, _ = load_model(run / "generator.safetensors")
        generated = image_files.GeneratedImages(generator)

        def teacher(images):
            return torch.stack([images.mean(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1)

        folder = tmp_path / "images"
        written = image_files.write(folder, generated.batches(9, "x"), teacher, ((), ()), form="folder", shard_size=5)
        assert written == 9
        assert image_files.check(folder, teacher) < 1e-6
        assert image_files.check(folder, lambda images: teacher(images) + torch.tensor([0, 5])) > 0.05
        soft = np.load(folder / "soft_labels.npy")
        np.save(folder / "soft_labels.npy", soft[:, ::-1])
        with pytest.raises(ExportError, match="has the label"):
            image_files.check(folder, teacher)
        description = json.loads((folder / "images.json").read_text())
        np.save(folder / "soft_labels.npy", soft)
        (folder / "images.json").write_text(json.dumps(description | {"images": 10}))
        with pytest.raises(ExportError, match="holds 9 images; 10 were written"):
            image_files.check(folder, teacher)

    def test_images_that_no_picture_can_hold_are_refused(self, tmp_path):
        with pytest.raises(ModelError, match="Images of 2 channels"):
            image_files.write(
                tmp_path / "images", iter([torch.zeros(1, 2, 4, 4)]), lambda x: x, ((), ()), form="folder", shard_size=1
            )

    def test_pixels_come_back_within_half_a_step(self):
        images = torch.rand(2, 3, 4, 4) * 2 - 1
        mean, std = [0.5, 0.5, 0.5], [0.5, 0.4, 0.3]
        back = image_files.from_bytes(image_files.to_bytes(images, mean, std), mean, std)
        assert (back - images).abs().max() <= 0.5 / 255 / 0.3 + 1e-6


class TestFamilies:
    """Through the packages that the folders are for, where these are installed."""

    def test_transformers_loads_any_student_with_the_code_that_is_named(self, run, call):
        transformers = pytest.importorskip("transformers")
        _, _, folder = call(run, "--formats", "huggingface")
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder / "huggingface", trust_remote_code=True, local_files_only=True
        )
        with torch.no_grad():
            found = model.eval()(pixel_values=IMAGES).logits
        torch.testing.assert_close(found, logits_of(run / "student_best.safetensors"))

    def test_a_student_of_transformers_is_saved_as_its_own(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        from dfad.delivery import huggingface
        from dfad.delivery.export import Request, export
        from dfad.models.generator import Generator

        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10
        )
        network = transformers.ResNetForImageClassification(config).eval()
        delivery = Delivery(network, {"image_shape": [1, 8, 8], "mean": [0.5], "std": [0.5]})
        generated = image_files.GeneratedImages(Generator((1, 8, 8), 8, 8))
        export(delivery, Request(["huggingface", "program"], generated), tmp_path / "out")
        saved = json.loads((tmp_path / "out" / "huggingface" / "config.json").read_text())
        assert saved["model_type"] == "resnet"
        found = huggingface.read(tmp_path / "out" / "huggingface")(IMAGES)
        torch.testing.assert_close(found, network(IMAGES).logits)

    def test_a_student_of_timm_is_saved_as_its_own(self, tmp_path):
        timm = pytest.importorskip("timm")
        from dfad.delivery.export import Request, export
        from dfad.models.generator import Generator

        network = timm.create_model("resnet10t", num_classes=10, in_chans=1).eval()
        manifest = {
            "image_shape": [1, 32, 32], "mean": [0.5], "std": [0.5],
            "architecture": {"factory": "timm:resnet10t", "kwargs": {"num_classes": 10, "in_chans": 1}},
        }  # fmt: skip
        delivery = Delivery(network, manifest)
        assert "timm" in default_formats(delivery)[0]
        generated = image_files.GeneratedImages(Generator((1, 32, 32), 8, 8))
        export(delivery, Request(["timm"], generated), tmp_path / "out")
        loaded = timm.create_model(f"local-dir:{tmp_path / 'out' / 'timm'}", pretrained=True, in_chans=1).eval()
        images = torch.randn(2, 1, 32, 32)
        torch.testing.assert_close(loaded(images), network(images))
        said = timm.data.resolve_model_data_config(loaded, use_test_size=True)
        assert (said["input_size"], said["mean"], said["std"]) == ((1, 32, 32), [0.5], [0.5])

    def test_a_timm_folder_that_is_left_out_for_the_normalisation_is_named(self, tmp_path):
        of_timm = type("OfTimm", (torch.nn.Linear,), {"__module__": "timm.models", "pretrained_cfg": {}})
        delivery = Delivery(of_timm(2, 2), {"image_shape": [1, 1, 2], "mean": [0.5], "std": [0.5]})
        assert "timm" in default_formats(delivery)[0]
        formats, left_out = default_formats(replace(delivery, normalise=True))
        assert "timm" not in formats
        assert any("No timm folder is written: timm's own network has no place" in sentence for sentence in left_out)
        with pytest.raises(ModelError, match="No timm folder can be written: timm's own"):
            timm_folder.write(replace(delivery, normalise=True), tmp_path / "refused")

    def test_others_are_no_students_of_timm(self, run, call):
        code, printed, folder = call(run, "--formats", "timm")
        assert (code, folder.exists()) == (3, False)
        assert "is not a network of timm" in printed


def test_a_new_run_in_the_folder_takes_the_old_export_away(tmp_path):
    kwargs = '{"channels": [4, 8, 8], "in_channels": 1}'
    run = distil(tmp_path / "run", kwargs=kwargs)
    with pytest.raises(SystemExit, match="0"):
        cli.run(lambda: export.main([str(run), "--formats=safetensors"]))
    assert (run / "export" / "student.safetensors").exists()
    distil(run, "--overwrite", kwargs=kwargs)
    assert not (run / "export").exists()


def test_a_teacher_that_torch_export_made(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 36, 3)).eval()
    path = tmp_path / "teacher.pt2"
    batch = ({0: torch.export.Dim("batch", max=64)},)
    torch.export.save(torch.export.export(layers, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=batch), path)
    settings = replace(TrainConfig(), teacher=TeacherConfig(factory=str(path)))
    teacher = export.find_teacher(settings, required=True)
    assert teacher.network(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
