"""Strict checks of Kubernetes manifests: built-in kinds, the Trainer's and JobSet's."""

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubeflow_trainer_api import models

VERSION = "1.34"
# jobset_v1alpha2 comes with the Trainer's models, because a runtime's template is a JobSet.
MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "ClusterTrainingRuntime": models.TrainerV1alpha1ClusterTrainingRuntime,
    "JobSet": models.JobsetV1alpha2JobSet,
}
CRDS = {
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "ClusterTrainingRuntime": "trainer.kubeflow.org_clustertrainingruntimes.yaml",
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
}
# Which the models wrap in an object of their own.
SCALARS = (
    "IoK8sApimachineryPkgApiResourceQuantity",
    "IoK8sApimachineryPkgUtilIntstrIntOrString",
)
SCALAR = {"type": ["string", "number"]}


def problems(manifest: dict[str, Any], crds: Path | None = None) -> list[str]:
    """What is wrong with one manifest; of the Trainer's kinds also by the CRDs in `crds`."""
    kind = manifest["kind"]
    if kind not in MODELS:
        try:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [_line(error)]
        return []
    schemas = [_model_schema(kind)] + ([_crd_schema(crds / CRDS[kind])] if crds else [])
    checks = [jsonschema.Draft202012Validator(schema) for schema in schemas]
    return [_line(error) for check in checks for error in check.iter_errors(manifest)]


def _line(error: jsonschema.ValidationError) -> str:
    """The innermost of an error that says only that no alternative fits."""
    while error.context:
        error = max(error.context, key=lambda one: len(one.absolute_path))
    return f"{error.json_path}: {error.message}"


@cache
def _model_schema(kind: str) -> dict[str, Any]:
    schema = _strict(MODELS[kind].model_json_schema(by_alias=True))
    return schema | {"$defs": schema["$defs"] | dict.fromkeys(SCALARS, SCALAR)}


@cache
def _crd_schema(path: Path) -> dict[str, Any]:
    definition = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    (version,) = [one for one in definition["spec"]["versions"] if one["storage"]]
    return _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Any) -> Any:
    """The same schema, where a key that it does not name is an error."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _strict(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema |= {"type": ["integer", "string"]}
    closed = isinstance(schema.get("properties"), dict) and "type" in schema
    if closed and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema
