"""Ways to put the knowledge of documents into a model, behind one interface (`interface`), one recipe a file."""
