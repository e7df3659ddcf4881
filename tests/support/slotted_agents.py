"""Files of models that fit into slots, and parts that consist of them."""

from __future__ import annotations

from paraserve_backend.protocol.names import ReplicaModels
from paraserve_backend.rpc import paraserve_pb2 as pb


def model_files(role: str, *, backend: str = "paraserve", **parameters: str) -> dict[str, bytes]:
    lines = [f'backend: "{backend}"']
    lines += [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in {"role": role, **parameters}.items()
    ]
    return {"config.pbtxt": "\n".join(lines).encode(), "1/.keep": b""}


def ensemble_files(*steps: str) -> dict[str, bytes]:
    text = "".join(
        f'step {{ model_name: "{step}" input_map {{ key: "x" value: "y" }} }}' for step in steps
    )
    config = f'platform: "ensemble" ensemble_scheduling {{ {text} }}'
    return {"config.pbtxt": config.encode(), "1/.keep": b""}


def head_part(replica: str = "tiny.1") -> pb.Part:
    """What the head of a pipeline gets: front, stage and link, and the ensemble of the latter."""
    names = ReplicaModels(replica)
    stage, link = names.stage(0), names.link
    models = {
        names.generate: model_files("generate", replica=replica),
        stage: model_files("stage", replica=replica),
        link: model_files("link", replica=replica),
        names.forward: ensemble_files(stage, link),
    }
    return pb.Part(
        replica=replica,
        models=[
            pb.ModelFiles(name=name, files=files, load_wave=int(name == names.forward))
            for name, files in models.items()
        ],
    )
