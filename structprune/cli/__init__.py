"""The command line: arguments, printing and exit codes; one file a verb. Nothing else prints."""
