"""The bundled run: the public commands one after another on bundled documents, and its report."""
