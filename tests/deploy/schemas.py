"""Holds manifests against the schemas of Kubernetes, and of custom resources, as the API server would.

    python schemas.py VERSION CRDS < manifests      in the environment of locks/deploy.txt

prints as JSON how many were checked, which kinds were not for want of a schema, and what is wrong.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-not-found, import-untyped, unused-ignore]
import kubernetes_validate  # type: ignore[import-not-found, import-untyped, unused-ignore]
import yaml


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of a CustomResourceDefinition as JSON Schema that takes no field which it has not."""
    made = {key: _strict(key, value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not keeps and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    if schema.get("nullable"):
        made = {"anyOf": [{"type": "null"}, made]}
    return made


def _strict(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: strict(each) for name, each in value.items()}
    # `allOf` and the like stand beside the properties and repeat some of them.
    if key in ("items", "additionalProperties") and isinstance(value, dict):
        return strict(value)
    return value


def custom(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The schemas in a folder of CustomResourceDefinitions (.yaml or .yaml.gz), by apiVersion and kind."""
    found = {}
    for file in sorted(folder.glob("*.yaml*")):
        data = file.read_bytes()
        text = gzip.decompress(data) if file.suffix == ".gz" else data
        for definition in yaml.load_all(text, yaml.CSafeLoader):
            spec = (definition or {}).get("spec", {})
            for version in spec.get("versions", []):
                schema = strict(version["schema"]["openAPIV3Schema"])
                # The schema leaves what every object has to the API server.
                schema["properties"]["metadata"] = {"type": "object"}
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = schema
    return found


def main() -> None:
    version, crds = sys.argv[1:]
    schemas = custom(Path(crds))
    checked, unknown, wrong = 0, set(), []
    for manifest in yaml.load_all(sys.stdin, yaml.CSafeLoader):
        kind = manifest["apiVersion"], manifest["kind"]
        what = f"{manifest['kind']} {manifest['metadata']['name']}"
        try:
            if schema := schemas.get(kind):
                jsonschema.Draft202012Validator(schema).validate(manifest)
            else:
                kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
        except kubernetes_validate.SchemaNotFoundError:
            unknown.add("/".join(kind))
        except jsonschema.ValidationError as error:
            wrong.append(f"{what}: {'.'.join(map(str, error.absolute_path))}: {error.message}")
    json.dump({"checked": checked, "unknown": sorted(unknown), "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main()
