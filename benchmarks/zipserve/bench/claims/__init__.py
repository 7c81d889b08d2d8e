"""ZipCache's claims about speed and size, measured side by side on a served model."""
