"""What a project begins with: a table's declaration, a question, a stage, written as text into its own files."""
