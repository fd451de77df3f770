"""What a YAML spec may say, where specs come from, and the small models that they describe."""
