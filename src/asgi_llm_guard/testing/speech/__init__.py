"""How providers speak: one file per dialect, written without the code that measures it."""
