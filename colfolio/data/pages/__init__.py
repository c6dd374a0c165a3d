"""Pages as pixels and as text: decoding, ink, lines, views, the text layer, titles."""
