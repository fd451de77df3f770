"""What a YAML spec may say, where specs come from, and the small models that they describe.

    spec = Registry().get("diffusers/wan")
    model = mini.build(spec, spec.mini.case())

- `model`: the parts of a spec and the rules between them; `recipe`: its `mini:` and `bench:`; `declared`: what all
  parts have in common; `field_types`: how an address, a key, a size is written.
- `loading`: from a file to a spec; `yaml_reader`: YAML with line and column of everything; `messages`: pydantic's
  errors in plain sentences; `trust`: which code a spec may name; `origin`: where a spec comes from.
- `registry`: the specs that are known, by name and by class.
- `json_schema`: for editors; `fingerprint`: of the source that a replacement was written for.
- `mini`: small models with random weights, and the forwards of a denoising loop for them.
"""
