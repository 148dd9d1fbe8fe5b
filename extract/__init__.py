"""Stage one: a frozen video encoder over all clips, its patch tokens into a store."""
