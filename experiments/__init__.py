"""Questions asked of trained models: lists of runs, the engine that executes them, and their reports.

    runs          what a run and a list of runs are, and `runlist.json`
    runlist       the engine: skip what is finished, resume what was cut, report after every run
    ablation      the list that changes the residual connection and nothing else
    depth_search  the list behind the config depth30
    sweeps        lists made of field changes that combine; sweep_files reads them from a file
    learning_rates  the list that tries each residual connection at several rates; rates says what came of it
    launch        job files for clusters, a task or a job a run
    progress      how far each run is, for the terminal, CSV and Parquet
    lists         the lists that have a name of their own
    records       a run folder read into typed arrays
    results       means, spreads and paired gaps over seeds: `results.json`
    style         colours and axes that every figure shares
    figures       the catalogue of figures; figures_* draw them
    sinkhorn      how far 20 Sinkhorn steps are from convergence, measured in float64
    findings      plain sentences from the numbers
    published     the paper's numbers at 27B parameters
    document      headings, tables and pictures, rendered as Markdown and as one HTML file
    report        puts the report together
    step_cost     step time and memory of the variants, side by side
    decode_speed  a token after a long context, dense and sparse attention side by side
    selection_recall  what cheaper choices of keys lose; run_attention: what the layers of a run choose from
    studies       questions that no list of runs fits: `mhc-jax study NAME`; study writes their reports
    sparse_attention_cost  what sparse attention costs over position; attention_modelled asks the TPU compiler,
                  published_costs is DeepSeek's own curve
    economics     what a model costs to train and to serve; economics_checks holds the arithmetic against published numbers
    scaling       the sweep over size and compute; scaling_study reads such a list, scaling_report and scaling_figures say and draw it
    scaling_law   the fit of L(N, D), on arrays; scaling_search its search, scaling_isoflop profiles at equal compute, scaling_points the
                  bootstrap; scaling_refit fits published points again, scaling_published holds published coefficients and gaps
    needle        whether sparse attention finds what dense attention finds; needle_task makes the sequences
    torch_*       the same shape in PyTorch beside them; torch_baseline runs in an environment of its own and imports nothing from here

Nothing here defines a model or a training step: the engine is handed a function that trains one config into one folder.
"""
