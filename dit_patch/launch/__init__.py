"""`dit-patch run`, the flags that other programs take from us, and pipelines in worker processes.

    parser = argparse.ArgumentParser()
    dit_patch.add_arguments(parser)                                      # flags
    handle = dit_patch.from_args(pipeline, parser.parse_args())
    run_command(Choice(patch_model="auto"), ["python", "generate.py"])   # run_command: an unmodified program

`flags` reads what is to be patched from a command line or the environment. `workers` patches the pipelines that live in
worker processes, through `worker_calls`. The other files are `dit-patch run`, in the order in which they act:

`run_command` starts the command, and prints the report when it has ended.
`run_folder` names the files and variables through which the processes of a run know of each other.
`site/sitecustomize.py` is imported by every Python process of the command at its start, and costs next to nothing.
`watch_imports` waits in that process for the modules of the classes that have specs.
`first_forward` patches each new instance of these classes at its first forward.
`find_pipeline` finds the pipeline that runs the model.
`summary` puts together what `dit_patch.report.journal` has written in each process.
"""
