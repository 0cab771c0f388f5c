"""Archives of runs: what is in them, the same bits a second time, and no folder of the machine."""

import tarfile

from editlab.experiments.archive import archive
from editlab.experiments.plan import Case, Run


def run(tmp_path, name, files):
    folder = tmp_path / "work" / name / "version_1"
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text)
    return Run(Case(name, {}), 1, folder)


def members(path):
    with tarfile.open(path) as packed:
        return {m.name: packed.extractfile(m).read().decode() for m in packed.getmembers()}


def test_settings_logs_and_outcomes_are_packed_without_folders_of_the_machine(tmp_path):
    project = tmp_path / "project"
    done = run(
        tmp_path,
        "done",
        {
            "summary.json": '{"edits": 4, "metrics": {}}',
            "config.yaml": f"path: {project}/facts.json\nother: {tmp_path}/shared/text.txt",
            "outcomes.csv": "fact\nFrance",
            "trust_events.jsonl": "{}",
            "events.out.tfevents.1": "binary",
            "hparams.yaml": "{}",
        },
    )
    failed = run(tmp_path, "failed", {"failed.json": '{"why": "NaN"}', "run.log": "Traceback"})
    waiting = run(tmp_path, "waiting", {"run.log": "started"})
    places = {str(tmp_path): "..", str(project): "."}
    first = archive([done, failed, waiting], tmp_path / "logs", places)
    assert [path.name for path in first] == ["done-1.tar.gz", "failed-1.tar.gz"]
    assert members(first[0]) == {
        "config.yaml": "path: ./facts.json\nother: ../shared/text.txt",
        "outcomes.csv": "fact\nFrance",
        "summary.json": '{"edits": 4, "metrics": {}}',
        "trust_events.jsonl": "{}",
    }
    assert members(first[1]) == {"failed.json": '{"why": "NaN"}', "run.log": "Traceback"}
    bits = first[0].read_bytes()
    (done.folder / "summary.json").touch()
    assert archive([done], tmp_path / "logs", places)[0].read_bytes() == bits
