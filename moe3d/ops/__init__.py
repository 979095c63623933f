"""The operation: schema and autograd (:mod:`.schema`), dispatch, and one module per backend."""
