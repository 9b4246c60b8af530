"""Tasks for plain lm-eval: YAML files and the classes that they name."""
