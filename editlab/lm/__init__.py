"""Language models: loading one, finding its parts, and running only the parts that are needed."""
