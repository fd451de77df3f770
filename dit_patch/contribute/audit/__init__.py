"""`dit-patch audit`: what a forward repeats, copies and waits for, at full size, without a GPU and without weights.

    subject = from_spec(Registry().get("diffusers/wan"))
    print(audit_text(audit(subject), device("H100")))

`subject` is the model, tiny and at full size; `targets` finds it. `audit` runs both on the simulated `accelerator`
(with its `autocast`): the tiny one with numbers, the large one in `shapes` alone. `recorder` makes `operations` of what
runs, with their `transfers`, and follows each to the arguments that it depends on; `repeats` says which results come
again. `summary` adds up, with times that `devices` estimates. `text`, `page` and `document` show it.

`program` audits the models of somebody else's program while it runs; inside of it `watching` finds them, and `live`
audits each. `worth` puts a draft of a spec in the order of what its sites are worth, and `table` goes through all
classes of a library.
"""
