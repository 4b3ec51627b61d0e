"""The report's statistics, what it warns of, and that its page opens in a browser."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy import stats

from dn_mmdet.checks.preflight import ConfigError
from dn_mmdet.experiments import report, results

CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)


def test_an_interval_is_that_of_students_t(close=math.isclose):
    values = [0.31, 0.35, 0.30, 0.37, 0.33]
    found = results.interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found.n == 5 and close(found.mean, np.mean(values))
    assert close(found.low, low) and close(found.high, high)


def test_an_interval_by_hand():
    # sd = 1, n = 4: half width t(0.975, 3) / 2 = 3.1824 / 2
    found = results.interval([-1.2247448714, 0, 0, 1.2247448714])
    assert found.mean == pytest.approx(0)
    assert found.high == -found.low == pytest.approx(1.59122, abs=1e-4)


def test_of_one_value_there_is_no_interval_and_of_none_no_mean():
    assert results.interval([0.5]) == (1, 0.5, None, None)
    assert results.interval([]) == (0, None, None, None)


def test_a_paired_difference_is_that_of_scipys_paired_test():
    values, baseline = [0.41, 0.44, 0.40, 0.46], [0.40, 0.41, 0.40, 0.42]
    found, p = results.paired(dict(enumerate(values)), dict(enumerate(baseline)))
    test = stats.ttest_rel(values, baseline)
    assert p == pytest.approx(test.pvalue)
    assert found.mean == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_a_seed_without_its_partner_is_no_pair_and_equal_differences_have_no_p():
    found, p = results.paired({0: 2.0, 1: 3.0, 7: 100.0}, {0: 1.0, 1: 2.0, 8: -100.0})
    assert found == (2, 1.0, None, None) and p is None
    values, baseline = [0.54, 0.47, 0.61, 0.33], [0.53, 0.46, 0.60, 0.32]  # but for roundings
    found, p = results.paired(dict(enumerate(values)), dict(enumerate(baseline)))
    assert found == (4, pytest.approx(0.01), None, None) and p is None
    found, p = results.paired({0: 2.0}, {0: 1.0})
    assert found == (1, 1.0, None, None) and p is None


# --- reports of small stored logs ---


def store(
    root,
    config='bn',
    seed=0,
    value=0.3,
    status='finished',
    metric='coco/bbox_mAP',
    lr=0.01,
    batch=8,
    data='voc07',
    fingerprint='abc',
    versions=None,
    order=0,
    **spec,
):
    """A run's folder as tools/compare.py leaves it."""
    folder = root / config / f'lr{lr:g}-batch{batch}-seed{seed}'
    folder.mkdir(parents=True)
    run = (
        dict(
            question='q',
            data=data,
            config=config,
            config_file=f'{config}.py',
            seed=seed,
            lr_factor=1.0,
            lr=lr,
            batch=batch,
            epochs=2,
            commit='c0ffee',
            order=order,
            different=[],
            config_hash='x',
        )
        | spec
    )
    (folder / 'run.json').write_text(json.dumps(run))
    lines = [
        dict(
            step=step,
            steps=4,
            epoch=step / 2,
            seconds=1.0,
            loss=4.0 / step + seed / 10,
            lr=lr,
            time=0.5,
        )
        for step in (1, 2, 3, 4)
    ]
    metrics = (
        {}
        if value is None
        else {metric: value, 'coco/cat_precision': value + 0.1, 'coco/dog_precision': value - 0.1}
    )
    lines.append(dict(step=4, steps=4, epoch=2.0, seconds=1.0, metrics=metrics))
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if status not in ('finished', 'diverged'):
        if status == 'failed':
            (folder / 'failure.json').write_text('{}')
        return folder
    result = dict(
        status=status,
        seconds=5.0,
        steps=4,
        iteration_seconds=0.5,
        starts=1,
        run=run,
        metrics=metrics if status == 'finished' else {},
        environment=dict(
            hardware='CPU',
            versions=dict(torch='2.11.0') | (versions or {}),
            data=dict(train=dict(samples=4, times=1, fingerprint=fingerprint)),
        ),
    )
    if status == 'finished':
        band = [0.8, 0.9, 1.0, 1.1, 1.2]
        result |= dict(
            norms=dict(BN=3),
            parameters=1000 if config == 'bn' else 1500,
            mult_adds={'convolutions': 10**6, 'SC': 5000, 'norms (element-wise)': 2000},
            peak_memory=dict(kind='process', megabytes=100.0),
            scale_and_shift=[
                dict(
                    layer=str(i),
                    gamma=band,
                    beta=band,
                    gamma_over_samples=0.1,
                    beta_over_samples=0.1,
                )
                for i in range(3)
            ],
        )
    (folder / 'result.json').write_text(json.dumps(result))
    return folder


@pytest.fixture
def grid(tmp_path):
    """BN and DN-B, three seeds at two rates and two batches; the folder of the runs."""
    for lr, batch in ((0.01, 8), (0.04, 8), (0.02, 16)):
        for seed in range(3):
            store(tmp_path, 'zbn', seed, 0.30 + seed / 100, lr=lr, batch=batch, order=0)
            store(tmp_path, 'dnb', seed, 0.32 + seed / 50, lr=lr, batch=batch, order=1)
    return tmp_path


def test_an_unpaired_difference_is_that_of_welchs_test():
    values, baseline = dict(enumerate([3.0, 5.0, 4.0, 9.0])), dict(enumerate([1.0, 2.0, 2.0]))
    found, p = results.unpaired(values, baseline)
    test = stats.ttest_ind([3, 5, 4, 9], [1, 2, 2], equal_var=False)
    assert (found.n, found.mean) == (3, pytest.approx(5.25 - 5 / 3))
    assert (p, found.low, found.high) == pytest.approx(
        (test.pvalue, *test.confidence_interval(0.95))
    )
    assert found.low < found.mean < found.high
    assert results.unpaired({0: 3.0}, baseline) == ((1, pytest.approx(4 / 3), None, None), None)
    assert results.unpaired({0: 3.0, 1: 3.0}, {0: 1.0, 1: 1.0}) == ((2, 2.0, None, None), None)
    assert results.unpaired({}, baseline) == ((0, None, None, None), None)


def test_an_unpaired_difference_where_one_side_does_not_spread_is_welchs_too():
    found, p = results.unpaired({0: 0.3, 1: 0.3, 2: 0.3}, {0: 0.1, 1: 0.2, 2: 0.15})
    assert found.mean == pytest.approx(0.15) and p == pytest.approx(0.0351, abs=1e-4)
    assert found.low < found.mean < found.high
    assert results.unpaired({0: 0.1 + 0.2, 1: 0.3}, {0: 0.1, 1: 0.1})[1] is None


def test_the_power_is_that_of_simulated_experiments():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 0.5, (4000, 5)), rng.normal(0.8, 0.5, (4000, 5))
    found = (stats.ttest_ind(second, first, axis=1).pvalue < 0.05).mean()
    assert results.power(5, 0.8, 0.5) == pytest.approx(found, abs=0.02)
    assert results.power(5, 0.0, 0.5) == pytest.approx(0.05)


@pytest.mark.parametrize('difference,seeds', [(1.0, 17), (0.5, 64), (0.8, 26)])
def test_seeds_needed_are_those_of_cohens_tables(difference, seeds):
    assert results.seeds_needed(difference, 1.0) == seeds
    assert results.power(seeds, difference, 1.0) >= 0.8 > results.power(seeds - 1, difference, 1.0)


def test_seeds_needed_of_nothing_is_told():
    with pytest.raises(ValueError, match='expected a difference and a spread above 0'):
        results.seeds_needed(0.0, 1.0)


def test_columns_of_a_gpu_training_are_kept_beside_rows_without_them(tmp_path):
    path = tmp_path / 'runs.csv'
    plain = dict(
        zip(
            results.COLUMNS,
            ('q', 'd', 'bn', 'BN', 0, 'm', 1.0, 2, 0.1, 8, 9, 3.0, 'CPU', 'c', 'finished'),
            strict=True,
        )
    )
    results.merge_rows(path, [plain])
    assert path.read_text().splitlines()[0] == ','.join(results.COLUMNS)
    more = dict(plain, seed=1, folded=0.5, backend='auto')
    results.merge_rows(path, [more])
    first, second = results.read_rows(path)
    assert first['folded'] is None and second['folded'] == 0.5 and second['backend'] == 'auto'
    assert {key: first[key] for key in plain} == plain


def test_the_table_says_what_is_left_after_folding_and_of_how_many_seeds(tmp_path):
    for seed in range(2):
        store(tmp_path, 'bn', seed, 0.30 + seed / 100)
        store(tmp_path, 'dnb', seed, 0.32 + seed / 50, order=1)
    written = report.write([tmp_path], tmp_path / 'report')
    assert 'folded' not in written.text
    assert (tmp_path / 'report/runs.csv').read_text().startswith(','.join(results.COLUMNS) + '\n')
    for seed in range(2):
        metrics = {'coco/bbox_mAP': 0.31 + seed / 50}
        fold = dict(folded=metrics, folded_most={'coco/bbox_mAP': 0.32}, folded_recalibrated=None)
        path = tmp_path / 'dnb' / f'lr0.01-batch8-seed{seed}' / 'folded.json'
        path.write_text(json.dumps(fold))
    written = report.write([tmp_path], tmp_path / 'report')
    header, _, bn, dnb = [
        line.split(' | ') for line in written.text.splitlines() if line.startswith('|')
    ][:4]
    at = header.index('folded')
    assert (bn[at], dnb[at]) == ('-', '0.32') and header[at - 1] == '95 % interval'
    assert '2 finished runs were not evaluated with folded layers' in written.text
    rows = results.read_rows(tmp_path / 'report' / 'runs.csv')
    assert [row['folded'] for row in rows] == [None, None, 0.31, 0.33]
    assert {row['folded_recalibrated'] for row in rows} == {None}
    assert [row['folded_most'] for row in rows] == [None, None, 0.32, 0.32]
    path.write_text(json.dumps(dict(not_folded='no images')))
    text = report.write([tmp_path], tmp_path / 'report').text
    assert '| 0.31 (1 of 2 seeds) |' in text and text.count('1 of 2 seeds') == 1
    assert '1 runs could not be folded: dnb (lr 0.01, batch 8, seed 1): no images' in text


def test_the_table_holds_mean_interval_paired_difference_and_cost(grid):
    table = results.summarise(results.read([grid]), 'zbn')
    assert len(table) == 6
    bn, dnb = (
        next(row for row in table if row['config'] == name and row['lr'] == 0.01)
        for name in ('zbn', 'dnb')
    )
    assert (bn['seeds'], bn['mean']) == (3, pytest.approx(0.31))
    assert bn['difference'] is None and bn['p'] is None
    expected = results.interval([0.02, 0.03, 0.04])
    assert dnb['difference'] == pytest.approx(expected.mean)
    assert dnb['difference_low'] == pytest.approx(expected.low)
    assert dnb['p'] == pytest.approx(
        stats.ttest_rel([0.32, 0.34, 0.36], [0.30, 0.31, 0.32]).pvalue
    )
    assert (
        dnb['parameters'],
        dnb['mult_adds'],
        dnb['element_wise'],
        dnb['sc_mult_adds'],
        dnb['iteration_seconds'],
    ) == (1500, 1005000, 2000, 5000, 0.5)


def test_the_baseline_is_the_config_that_was_planned_first_or_the_one_named(tmp_path):
    store(tmp_path, 'zbn', order=0)
    store(tmp_path, 'dnb', order=1)
    assert 'difference to zbn' in report.write([tmp_path], tmp_path / 'report').text
    assert 'difference to dnb' in report.write([tmp_path], tmp_path / 'report', None, 'dnb').text
    with pytest.raises(ConfigError, match='expected one of dnb, zbn'):
        report.write([tmp_path], tmp_path / 'report', None, 'gn')


def test_all_files_are_written_and_rows_read_back_give_the_same_table(grid, tmp_path):
    out = tmp_path / 'report'
    written = report.write([grid], out)
    for name in ('learning_curves', 'metric_vs_lr', 'metric_vs_batch', 'per_class', 'scale_shift'):
        assert (out / f'{name}.png').stat().st_size > 5000
        assert f'{name}.png' in (out / 'report.md').read_text()
    assert results.read_rows(out / 'runs.csv') == written.rows
    assert len(written.rows) == 18
    kept = ('config', 'lr', 'seeds', 'mean', 'low', 'difference', 'difference_high', 'p')
    tables = [
        results.summarise(results.read([source]), 'zbn') for source in (grid, out / 'runs.csv')
    ]
    by_lr = [
        {(row['config'], row['lr']): [row[key] for key in kept] for row in table}
        for table in tables
    ]
    assert by_lr[0] == by_lr[1]


def test_figures_hold_means_over_seeds_against_rate_and_batch(grid):
    figures = report.figures(results.read([grid]), 'zbn')
    (panel,) = figures['metric_vs_lr'][1]
    line = next(line for line in panel.lines if line.name == 'dnb')
    assert line.x == [0.01, 0.04] and line.y == pytest.approx([0.34, 0.34])
    (panel,) = figures['metric_vs_batch'][1]  # rates in proportion: 0.01 at 8, 0.02 at 16
    assert panel.lines[0].x == [8, 16]
    (panel,) = figures['per_class'][1]
    assert panel.lines[0].x == ['cat', 'dog']
    assert panel.lines[0].y == pytest.approx([0.03, 0.03])
    losses = next(line for line in figures['learning_curves'][1][0].lines if line.name == 'dnb')
    assert losses.x == [0.5, 1.0, 1.5, 2.0]
    assert losses.y == pytest.approx([4.1, 2.1, 4 / 3 + 0.1, 1.1])
    assert losses.low[0] < losses.y[0] < losses.high[0]


def test_long_curves_are_means_of_their_stretches(tmp_path):
    folder = store(tmp_path, 'bn')
    lines = [
        dict(
            step=step, steps=150, epoch=step / 75, seconds=1.0, loss=float(step), lr=0.1, time=0.5
        )
        for step in range(1, 151)
    ]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    loss = report.figures(results.read([tmp_path]), 'bn')['learning_curves'][1][0].lines[0]
    assert len(loss.x) == 50 and loss.x[-1] == 2
    assert loss.y == [2.0 + 3 * i for i in range(50)]


def test_curves_show_training_accuracy_where_the_log_has_it(tmp_path):
    folder = store(tmp_path, 'bn')
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    for line in lines[:4]:
        line['accuracy_top-1'] = 10.0 * line['step']
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    panels = report.figures(results.read([tmp_path]), 'bn')['learning_curves'][1]
    assert [panel.y for panel in panels] == ['training loss', 'training top-1', 'coco/bbox_mAP']
    assert panels[1].lines[0].y == [10, 20, 30, 40] and not panels[1].log_y


def test_names_stand_on_an_axis_of_names():
    import matplotlib.pyplot as plt

    from dn_mmdet.experiments import figures

    cell, axes = plt.subplots()
    line = figures.Line('a', ['cat', 'dog'], [1.0, 2.0], [None] * 2, [None] * 2, True)
    figures._draw_panel(axes, figures.Panel('', 'class', 'AP', [line]), {})
    cell.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ['cat', 'dog']
    plt.close(cell)


def test_the_head_names_all_that_makes_figures_incomparable(tmp_path):
    store(tmp_path, 'bn', 0)
    store(tmp_path, 'bn', 1, fingerprint='other')
    store(tmp_path, 'bn', 2, versions=dict(torch='2.12.0'))
    store(tmp_path, 'bn', 3, status='diverged')
    store(tmp_path, 'dnb', 0, value=None)
    store(tmp_path, 'dnb', 1, status='failed')
    store(tmp_path, 'dnb', 2, status='unfinished')
    store(tmp_path, 'wide', 0, different=['model.backbone.widen_factor: 1.0 and 1.3'])
    head = '\n'.join(report.notes(results.read([tmp_path])))
    for text in (
        '1 of 8 runs unfinished: dnb (lr 0.01, batch 8, seed 2)',
        '1 of 8 runs failed: dnb (lr 0.01, batch 8, seed 1)',
        '1 of 8 runs diverged: bn (lr 0.01, batch 8, seed 3)',
        'the metric is missing from 1 finished runs: dnb',
        '**different data** under the name voc07, train',
        '**different versions** of torch: 2.11.0, 2.12.0',
        'wide differs in more than the norm: model.backbone.widen_factor',
    ):
        assert text in head


def test_the_head_names_what_cannot_be_told_apart_from_the_norm(tmp_path):
    for seed in range(2):
        store(tmp_path, 'bn', seed, commit='c0ffee')
        store(tmp_path, 'dnb', seed, commit='beef00')
        store(tmp_path, 'wide', seed, commit=('c0ffee', 'beef00')[seed])
    head = report.notes(results.read([tmp_path]))
    assert head == [
        'different commit: beef00, c0ffee',
        '**no commit in common**: bn (c0ffee) and dnb (beef00): their difference may come from '
        'that',
        'intervals and p are not corrected for 2 comparisons',
    ]


def test_runs_of_other_options_under_one_name_are_told(tmp_path):
    store(tmp_path / 'a', 'bn', 0, options_hash='x')
    store(tmp_path / 'b', 'bn', 1, options_hash='y')
    store(tmp_path / 'b', 'bn', 2)  # of before there was this
    (head,) = report.notes(results.read([tmp_path]))
    assert head.startswith('**different options** in one row of the tables, bn: 2 configs')


def test_the_table_says_of_how_many_seeds_a_paired_difference_is(tmp_path):
    for seed in range(3):
        store(tmp_path, 'bn', seed, value=0.3 + seed / 100)
        store(tmp_path, 'dnb', seed + 1, value=0.4 + seed**2 / 100)
    text = report.write([tmp_path], tmp_path / 'report').text
    assert '+0.09 (2 of 3 seeds)' in text


def test_a_clean_report_has_no_head(tmp_path):
    store(tmp_path, 'bn', 0)
    store(tmp_path, 'dnb', 0)
    assert report.notes(results.read([tmp_path])) == []


def test_a_diverged_run_counts_as_diverged_and_in_no_mean(tmp_path):
    store(tmp_path, 'bn', 0)
    store(tmp_path, 'bn', 1)
    store(tmp_path, 'dnb', 0, value=0.5)
    store(tmp_path, 'dnb', 1, status='diverged')
    written = report.write([tmp_path], tmp_path / 'report')
    assert [row['status'] for row in written.rows].count('diverged') == 1
    row = results.summarise(results.read([tmp_path]), 'bn')[1]
    assert (row['seeds'], row['diverged'], row['mean'], row['pairs']) == (1, 1, 0.5, 1)
    assert 'seed 1); means and p are of the others' in written.text


def test_another_metric_can_be_chosen(tmp_path):
    store(tmp_path)
    assert results.read([tmp_path])[0].row['value'] == 0.3
    assert results.read([tmp_path], 'coco/cat_precision')[0].row['value'] == 0.4
    assert results.read([tmp_path], 'coco/owl_precision')[0].row['value'] is None


def test_a_run_that_is_found_twice_counts_once_and_that_is_said(tmp_path):
    store(tmp_path / 'here', value=0.3)
    store(tmp_path / 'there', value=0.4)
    written = report.write([tmp_path / 'here', tmp_path / 'there'], tmp_path / 'report')
    assert [row['value'] for row in written.rows] == [0.4]
    assert '1 runs were found twice; the last one counts' in written.text


def test_rows_are_merged_into_a_file_without_losing_those_of_other_runs(tmp_path):
    path = tmp_path / 'docs' / 'runs.csv'
    rows = [
        run.row
        for run in results.read([store(tmp_path, seed=seed).parent.parent for seed in (0,)])
    ]
    results.merge_rows(path, rows)
    other = dict(rows[0], seed=5, question='another, with a comma')
    results.merge_rows(path, [other])
    better = dict(rows[0], value=0.9)
    results.merge_rows(path, [better])
    assert results.read_rows(path) == [better, other]
    (tmp_path / 'wrong.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ConfigError, match='expected the columns question, data'):
        results.read_rows(tmp_path / 'wrong.csv')


def test_sources_without_runs_are_told(tmp_path):
    with pytest.raises(ConfigError, match='holds no runs'):
        results.read([tmp_path])
    with pytest.raises(ConfigError, match='expected a folder'):
        results.read([tmp_path / 'absent'])


def test_the_page_needs_nothing_from_elsewhere(grid, tmp_path):
    pytest.importorskip('plotly')
    report.write([grid], tmp_path / 'report')
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert page.count('<table>') == 6
    assert page.count('Plotly.newPlot') >= 5
    outside = re.sub(r'(<script[^>]*>).*?</script>', r'\1', page, flags=re.DOTALL)
    assert len(outside) < len(page) / 10  # plotly itself is in the page
    assert 'src=' not in outside and 'href=' not in outside


def test_the_page_opens_in_a_browser(grid, tmp_path):
    pytest.importorskip('plotly')
    if CHROMIUM is None:
        pytest.skip('no chromium here to open the page with')
    report.write([grid], tmp_path / 'report')
    dom = subprocess.run(
        [
            CHROMIUM,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-quic',
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            f'--user-data-dir={tmp_path / "profile"}',
            '--virtual-time-budget=20000',
            '--dump-dom',
            (tmp_path / 'report' / 'report.html').as_uri(),
        ],
        check=True,
        text=True,
        capture_output=True,
        timeout=120,
    ).stdout
    assert dom.count('class="main-svg"') >= 5  # plotly ran and drew every figure
    assert 'paired difference to zbn' in dom
