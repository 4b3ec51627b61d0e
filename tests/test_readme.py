"""What README and docs claim in code and in numbers holds."""

import csv
import re
import statistics
from pathlib import Path

import claims
import evidence
import numpy as np
import pytest
import speed
import torch
import torch.nn.functional as F
from conftest import awake
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torchvision.models import mobilenet_v2

from dn_mmdet import DNB
from dn_mmdet.deploy import trade_off
from dn_mmdet.experiments import results
from dn_mmdet.experiments.cost import mult_adds

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
README = (ROOT / 'README.md').read_text()
# zoo.md is written by tools/check_zoo.py and names nothing of this repository.
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')] + [
    path for path in sorted(DOCS.rglob('*.md')) if path.name != 'zoo.md'
]


def one_line(name):
    """A page of the docs as one line of text, for numbers that may stand across a line's end."""
    return ' '.join((DOCS / name).read_text().split())


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_its_snippets_run():
    config, convert = re.findall(r'```python\n(.+?)```', README, re.S)
    cfg = Config.fromstring(config, '.py')
    assert cfg.model.backbone.norm_cfg.type in MODELS
    names = {}
    exec(convert, names)
    assert any(isinstance(module, DNB) for module in names['model'].modules())


def test_equivalent_to_is_dn_b(close):
    section = (DOCS / 'inside.md').read_text().split('## Equivalent to')[1]
    lines = re.search(r'\n((?:    .+\n)+)', section).group(1)
    code = '\n'.join(line[4:] for line in lines.splitlines())
    assert len(code.splitlines()) == 3
    for training in (True, False):
        layer = awake(DNB(6)).double().train(training)
        x = torch.randn(3, 6, 5, 4, dtype=torch.float64) * 3 + 1
        names = dict(
            torch=torch,
            F=F,
            x=x,
            eps=layer.eps,
            training=training,
            weight=layer.weight,
            bias=layer.bias,
            running_mean=layer.running_mean.clone(),
            running_var=layer.running_var.clone(),
            w_in=layer.sc.w_in,
            b_in=layer.sc.b_in[:, None],
            w_out=layer.sc.w_out,
            b_out=layer.sc.b_out[:, None],
        )
        exec(code, names)
        close(names['y'], layer(x))


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_every_file_and_every_make_target_that_a_page_names_exists(path):
    text = path.read_text()
    for link in re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', text):
        if not link.startswith('http'):
            assert (path.parent / link).exists(), link
            # The site holds the docs alone: a link that leaves them would lead nowhere.
            assert path.parent == ROOT or (path.parent / link).resolve().is_relative_to(DOCS), link
    configs = {path.stem for path in (ROOT / 'configs').glob('*.py')}
    for name in re.findall(r'`(\w*(?:_(?:bn|dnb|dnc)_|\{[^}]+\})\w*)\.py`', text):
        before, options, after = re.fullmatch(r'(\w*?)(?:\{(.+)\})?(\w*)', name).groups()
        for option in (options or '').split(','):
            assert f'{before}{option}{after}' in configs, name
    for name in re.findall(r'`(tools/[a-z_]+\.(?:py|sh))\b', text):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'(?:^    |`)make ([a-z][a-z-]*)', text, re.M):
        assert re.search(rf'^{target}:', makefile, re.M), target


def test_the_site_and_its_start_page_have_every_page():
    site = (ROOT / 'mkdocs.yml').read_text()
    start = (DOCS / 'README.md').read_text()
    for path in DOCS.rglob('*.md'):
        name = path.relative_to(DOCS).as_posix()
        assert f': {name}\n' in site, name
        assert name == 'README.md' or f']({name})' in start, name


def test_every_tool_and_every_config_has_a_line():
    tools = (DOCS / 'tools.md').read_text()
    for path in (ROOT / 'tools').iterdir():
        if path.suffix in ('.py', '.sh'):
            assert f'tools/{path.name}' in tools, path.name
    written = set()
    for name in re.findall(r'`(\w+(?:\{[^}]+\}\w+)?)\.py`', (DOCS / 'configs.md').read_text()):
        before, options, after = re.fullmatch(r'(\w*?)(?:\{(.+)\})?(\w*)', name).groups()
        written.update(f'{before}{option}{after}' for option in (options or '').split(','))
    assert written == {path.stem for path in (ROOT / 'configs').glob('*.py')}


def test_parameters_and_mult_adds_are_as_stated():
    def parameters(norm):
        cfg = Config.fromfile(ROOT / 'configs' / f'ssdlite_mbv2_{norm}_coco.py')
        return sum(parameter.numel() for parameter in MODELS.build(cfg.model).parameters())

    init_default_scope('mmdet')
    bn, dnb = parameters('bn'), parameters('dnb')
    stated = f'{bn / 1e6:.2f} M with BN and {dnb / 1e6:.2f} M with DN-B (+{dnb / bn - 1:.0%})'
    for text in (README, one_line('paper.md')):
        assert stated.replace('%', ' %') in text
    model = mobilenet_v2(num_classes=100, norm_layer=DNB)
    counted = mult_adds(model, lambda: model(torch.randn(1, 3, 224, 224)))
    share = counted['SC'] / (counted['convolutions'] + counted['linears'])
    for text in (README, one_line('paper.md')):
        assert f'SC adds {share:.2%} Mult-Adds'.replace('%', ' %') in text


# Rows of the speed table: part, task, batch, measure and unit of the benchmark's rows.
SPEED = {
    'train step, batch 8': ('detector', 'train', '8', 'time', 'of BN'),
    'inference, batch 8': ('detector', 'inference', '8', 'time', 'of BN'),
    'inference, batch 1': ('detector', 'inference', '1', 'time', 'of BN'),
    'inference, batch 8, against BN folded into the convolutions': (
        'detector',
        'inference',
        '8',
        'time',
        'of BN folded',
    ),
    'inference, batch 1, against BN folded into the convolutions': (
        'detector',
        'inference',
        '1',
        'time',
        'of BN folded',
    ),
    'the 76 layers alone, forward + backward, geometric mean': (
        'layers',
        'train',
        '8',
        'time',
        'of BN',
    ),
    'the 76 layers alone, inference, geometric mean': (
        'layers',
        'inference',
        '8',
        'time',
        'of BN',
    ),
    'bytes saved for backward': ('layers', 'train', '8', 'bytes saved', 'of BN'),
}


def benchmark_rows():
    with open(ROOT / 'docs' / 'results' / 'benchmark_cpu.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_the_slowest_layer_is_the_benchmarks():
    ratios = {
        row['map']: float(row['median'])
        for row in sorted(benchmark_rows(), key=lambda row: float(row['median']))
        if (row['part'], row['task'], row['unit'], row['norm'], row['backend'])
        == ('layer', 'train', 'of BN', 'DNB', 'cpp')
    }
    assert max(ratios, key=ratios.get) == '1'
    assert f"takes up to {ratios['1']:.1f} times BatchNorm's" in one_line('speed.md')


def test_the_speed_table_is_the_benchmarks():
    text = (DOCS / 'speed.md').read_text()
    measured = {
        tuple(
            row[key] for key in ('part', 'task', 'batch', 'measure', 'unit', 'norm', 'backend')
        ): row
        for row in benchmark_rows()
        if row['part'] != 'layer'
    }
    for label, key in SPEED.items():
        cells = re.search(rf'^\| {re.escape(label)} \|(.+)\|$', text, re.M).group(1)
        for cell, backend in zip(cells.split('|'), ('cpp', 'torch', 'reference'), strict=False):
            row = measured[(*key, 'DNB', backend)]
            expected = (
                [row['median']]
                if label.startswith('bytes')
                else [row['median'], row['q10'], row['q90']]
            )
            assert re.findall(r'[\d.]+', cell) == [f'{float(v):.2f}' for v in expected], label
    train, inference, folded = (
        float(measured[(*SPEED[label], 'DNB', 'cpp')]['median'])
        for label in (
            'train step, batch 8',
            'inference, batch 8',
            'inference, batch 8, against BN folded into the convolutions',
        )
    )
    assert (
        f"{train:.2f} of BatchNorm's time for a training step, {inference:.2f} for inference, "
        f'{folded:.2f} where BatchNorm is folded'
    ) in README


def test_the_gain_is_that_of_the_runs():
    """The claim in one sentence, as trained and folded, with Welch's intervals."""
    found = evidence.differences('Causes, on a GPU')
    gain, low, high = found['mobilenetv2_dnb_tinyin100', 'value']
    assert f'{gain:.1f} points of top-1' in README
    text = README.replace('\n', ' ')
    assert f'DN-B gains {gain:.2f} points of top-1 (95 %: {low:.2f} to {high:.2f})' in text
    lost, low, high = (-x for x in found['mobilenetv2_dnb_tinyin100', 'folded'])
    assert f'it is {lost:.2f} points behind BN ({high:.2f} to {low:.2f})' in text
    lost, low, high = (-x for x in found['mobilenetv2_dnb_tinyin100', 'folded_recalibrated'])
    assert f'or {lost:.2f} ({high:.2f} to {low:.2f}) with new running statistics' in text


def test_the_gain_in_the_figure_is_that_of_the_runs():
    found = evidence.differences('Classification')
    gain, low, high = found['mobilenetv2_dnb_tinyin100_32px', 'value']
    assert f'DN-B gains {gain:.2f} points there (95 %: {low:.2f} to {high:.2f})' in README
    assert f'and {gain:.2f} in another ([{low:.2f} to {high:.2f}]' in one_line('why.md')


def test_the_gain_of_the_small_detector_is_that_of_the_runs():
    found = evidence.differences('Causes, digits')
    (gain, low, high), (folded, folded_low, folded_high) = (
        [100 * value for value in found['dnb', column]] for column in ('value', 'folded')
    )
    assert (
        f'DN-B gains {gain:.2f} points of AP (95 %: {low:.2f} to {high:.2f}), and {folded:.2f} '
        f'({folded_low:.2f} to {folded_high:.2f}) with all layers folded'
    ) in README.replace('\n', ' ')


def test_the_times_when_deployed_are_those_of_the_runtimes():
    with open(ROOT / 'docs' / 'results' / 'runtimes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len({row['runtime'].split('-')[0] for row in rows}) == 6
    dynamic, folded = (
        [float(row['ratio']) for row in rows if row['model'] == model]
        for model in ('dynamic', '76 of 76 folded')
    )
    assert (
        f'six runtimes, against folded BN: {min(dynamic):.1f} to {max(dynamic):.1f} times its '
        f'time, or {min(folded):.2f} to {max(folded):.2f} with'
    ) in README


def test_what_the_page_on_causes_says_is_what_the_runs_say():
    text = one_line('why.md').split('## What the runs say')[1].split('## The questions')[0]
    number = r'[+-]\d+\.\d\d'
    said = re.findall(rf'{number} \({number} to {number}\)', text)
    assert len(said) > 10
    tables = evidence.adaptation('Causes, on a GPU')
    for baseline in (None, 'mobilenetv2_dnb_tinyin100'):
        for found in evidence.differences('Causes, on a GPU', baseline).values():
            tables += '\n{:+.2f} ({:+.2f} to {:+.2f})'.format(*found)
    for baseline in (None, 'dnb'):
        for found in evidence.differences('Causes, digits', baseline).values():
            tables += '\n{:+.2f} ({:+.2f} to {:+.2f})'.format(*(100 * value for value in found))
    for baseline in ('ssdlite_mbv2_bn_digits', 'dnb'):
        for found in evidence.differences('Learning rate, digits', baseline).values():
            tables += '\n{:+.2f} ({:+.2f} to {:+.2f})'.format(*(100 * value for value in found))
    tables += str([pilot(name) for name in ('dnc', 'bnwide1.1')])
    wrong = {triple for triple in said if triple not in tables}
    assert not wrong, wrong
    dnc, dnb = (
        {r['seed']: 100 * r['value'] for r in runs('Causes, digits')[n]} for n in ('dnc', 'dnb')
    )
    paired, _ = results.paired(dnc, dnb)
    assert f'; paired {paired.low:+.2f} to {paired.high:+.2f})' in text
    assert f'(correlation {statistics.correlation(dnc.values(), dnb.values()):.2f})' in one_line(
        'why.md'
    )


def pilot(norm):
    """The difference of a norm to BN in the pilot, with its interval."""
    top1 = {}
    with open(ROOT / 'docs' / 'results' / 'pilot_h200.csv', newline='') as file:
        for row in csv.DictReader(file):
            top1.setdefault(row['norm'], {})[row['seed']] = float(row['top1'])
    found, _ = results.unpaired(top1[norm], top1['bn'])
    return f'{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})'


def runs(question):
    """The rows of a question, by config."""
    rows = results.read_rows(DOCS / 'results' / 'runs.csv')
    return results.grouped((r for r in rows if r['question'] == question), lambda r: r['config'])


def test_what_the_pages_say_of_stability_is_what_the_runs_say():
    bn, dnb, _ = (
        {(round(r['lr'] * 128 / r['batch'], 5), r['batch']): r['value'] for r in rows}
        for rows in runs('Stability, on a CPU').values()
    )
    assert bn.keys() == dnb.keys()
    lost = [of[0.1, 128] - of[0.4, 128] for of in (bn, dnb)]
    text = one_line('why.md')
    assert f'DN-B loses less than BN, by {lost[0] - lost[1]:.2f}' in text
    assert (
        f'BN is ahead by {bn[0.1, 32] - dnb[0.1, 32]:.2f}; with batches of 8, DN-B is ahead by '
        f'{dnb[0.1, 8] - bn[0.1, 8]:.2f}'
    ) in text


def test_what_the_page_on_causes_says_of_the_learning_rate_is_what_the_runs_say():
    text = one_line('why.md')
    bn, dnb, rate = 'ssdlite_mbv2_bn_digits', 'dnb', 'bn-rate-30'
    found = {
        (first, second): '{:+.2f} ({:+.2f} to {:+.2f})'.format(
            *(
                100 * x
                for x in evidence.differences('Learning rate, digits', second)[first, 'value']
            )
        )
        for first, second in ((rate, bn), (dnb, bn), (rate, dnb))
    }
    assert f'BN gains {found[rate, bn]} points of AP' in text
    assert f'DN-B gains {found[dnb, bn]}, and `{rate}` is at {found[rate, dnb]} of DN-B' in text
    seeds = {
        config: {r['seed']: r['value'] for r in rows}
        for config, rows in runs('Learning rate, digits').items()
    }
    assert f'and seeds 1 to {len(seeds[rate])} of item 8' in text
    for seed, value in seeds[bn].items():  # 'in each seed, both are ahead of BN'
        assert min(seeds[dnb][seed], seeds[rate][seed]) > value
    single = {config: row['value'] for config, (row,) in runs('Other controls, digits').items()}
    assert max(single[name] for name in single if 'rate' in name) == single[rate]
    assert min(single, key=single.get) == bn  # 'no control stays where BN is'


def test_what_the_pages_say_of_two_machines_is_what_the_runs_say():
    values = {}
    for question in ('Causes, digits', 'Other controls, digits', 'Learning rate, digits'):
        for config, rows in runs(question).items():
            for row in rows:
                values.setdefault((config, row['seed']), []).append(row['value'])
    most = max(max(each) - min(each) for each in values.values())
    assert f'differs by up to {most:.2f} between two machines' in README
    assert f'differed by up to {most:.2f}' in one_line('why.md')
    assert f'differs by up to {most:.2f} between two machines' in one_line('tested.md')


def test_what_the_pages_say_of_averaged_weights_is_what_the_runs_say():
    worse = [
        np.mean([r['value'] - r['averaged'] for r in rows])
        for rows in runs('Causes, on a GPU').values()
        if len(rows) == 3
    ]
    assert len(worse) == 4
    assert f'are {min(worse):.1f} to {max(worse):.1f} points worse' in one_line('why.md')


def test_what_the_pages_say_of_folding_is_what_the_runs_say():
    found = runs('Causes, on a GPU')
    dnb, bn = found['mobilenetv2_dnb_tinyin100'], found['mobilenetv2_bn_tinyin100']
    most = np.mean([r['value'] - r['folded_most'] for r in dnb])
    gain = np.mean([r['value'] for r in dnb]) - np.mean([r['value'] for r in bn])
    text = one_line('deploying.md')
    assert f'that vary least cost {most:.2f} of the {gain:.2f} points that DN-B gains' in text
    (voc,) = runs('Detection, folded')['ssdlite_mbv2_dnb_voc07_128px']
    lost = {name: 1 - voc[name] / voc['value'] for name in ('folded_recalibrated', 'folded')}
    assert round(1 / lost['folded_recalibrated']) == 5 and 0.25 < lost['folded'] < 0.33
    assert 'a fifth with new running statistics, more than a quarter without' in text
    assert 'does lose about a fifth of its small AP' in one_line('why.md')


def test_what_the_page_on_causes_says_of_the_pilot_is_what_its_rows_say():
    top1 = {}
    with open(ROOT / 'docs' / 'results' / 'pilot_h200.csv', newline='') as file:
        for row in csv.DictReader(file):
            top1.setdefault(row['norm'], []).append(float(row['top1']))
    bn = top1['bn']
    dnb, wider = (
        statistics.mean(top1[name]) - statistics.mean(bn) for name in ('dnb_b=0.25', 'bnwide1.28')
    )
    text = one_line('why.md')
    assert (
        f'four seeds of DN-B were {dnb:.2f} above four of BN. From two seeds each, DN-C was at '
        f'{pilot("dnc")}, BN of 1.1 times the width at {pilot("bnwide1.1")}, and BN of 1.28 times '
        f'the width at {wider:+.2f}'
    ) in text
    spread = ', '.join(f'{statistics.stdev(top1[name]):.2f}' for name in ('bn', 'dnb_b=0.25'))
    assert f'(a pilot) | {spread} | {statistics.correlation(bn, top1["dnb_b=0.25"]):.2f} |' in text


def test_what_the_page_on_causes_says_of_repeated_runs_is_what_their_rows_say():
    with open(ROOT / 'docs' / 'results' / 'repeats.csv', newline='') as file:
        changes = [
            float(row['second CPU']) - float(row['first CPU']) for row in csv.DictReader(file)
        ]
    *all_but_last, last = (f'{change:+.1f}' for change in changes)
    assert f'Top-1 changed by {", ".join(all_but_last)} and {last}.' in one_line('why.md')


def test_the_speed_on_a_gpu_is_the_benchmarks():
    text = speed.PAGE.read_text()
    assert speed.with_table(text, speed.read()) == text, (
        'python tests/speed.py writes the table again'
    )


def test_the_tables_of_tile_sizes_are_the_benchmarks():
    text = speed.TUNING_PAGE.read_text()
    assert len(speed.TUNING.findall(text)) == 3
    assert speed.with_tuning_tables(text, speed.read(speed.TUNING_ROWS)) == text, (
        'python tests/speed.py writes the tables again'
    )
    assert len(speed.COMPILED.findall(text)) == 1
    assert speed.with_compiled_table(text, speed.read()) == text
    assert f'-->\n{speed.MISSING}\n<!-- end' in speed.with_compiled_table(text, [])
    assert speed.with_tuning_tables(text, []).count(f'-->\n{speed.MISSING}\n<!-- end') == 3


def test_the_readmes_times_on_a_gpu_are_the_benchmarks():
    measured = {
        (row['task'], row['measure'], row['memory_format']): float(row['median'])
        for row in speed.read()
        if row['part'] == 'layers' and row['norm'] == 'DNB' and row['unit'] == 'of BN'
    }
    (step,) = (
        row['median']
        for row in speed.read()
        if (row['part'], row['task'], row['norm'], row['measure'], row['unit'])
        == ('detector', 'train', 'DNB', 'time', 'of BN')
    )
    contiguous, channels_last, inference = (
        measured[key]
        for key in (
            ('train', 'sum of times', 'contiguous'),
            ('train', 'sum of times', 'channels_last'),
            ('inference', 'sum of times', 'contiguous'),
        )
    )
    assert (
        f"{contiguous:.2f} of BatchNorm's time for forward and backward, "
        f'{channels_last:.2f} in channels_last; inference {inference:.2f}; a whole training '
        f'step of SSDLite {step:.2f}'
    ) in README


def test_what_the_readme_says_against_folded_and_compiled_batch_norms_is_measured():
    def measured(part, task, unit):
        (median,) = (
            row['median']
            for row in speed.read()
            if (row['part'], row['task'], row['unit'], row['measure'], row['norm'])
            == (part, task, unit, 'time', 'DNB')
        )
        return median

    folded = measured('detector', 'inference', 'of BN folded')
    text = ' '.join(README.split())
    assert f'folded into the convolutions, DN-B takes {folded:.2f} of its time' in text
    assert round(measured('compiled', 'compiled', 'of BN')) == 3 and 'three times as long' in text


def gpu_row(line, layout, measure, median, **others):
    return dict(
        dict(
            part=line.part,
            task=line.task,
            measure=measure,
            unit='of BN',
            batch=line.batch,
            dtype=line.dtype,
            memory_format=layout,
            norm='DNB',
            backend='auto',
            median=median,
            device='NVIDIA X',
            commit='abc123',
            torch='2',
            triton='3',
            date='2026-01-02 03:04',
        ),
        **others,
    )


def test_a_table_of_gpu_speed_follows_the_rows_and_names_card_and_commit():
    first, second, *_ = speed.LINES
    page = f'a\n{speed.BEGIN}\nearlier\n{speed.END}\nb'
    made = speed.with_table(
        page,
        [
            gpu_row(first, 'contiguous', first.eager, 0.714),
            gpu_row(first, 'channels_last', first.alone, 1.2),
            gpu_row(first, 'contiguous', first.eager, 9, backend='torch'),
            gpu_row(second, 'contiguous', second.alone, 0.5),
        ],
    )
    assert 'earlier' not in made and 'NVIDIA X' in made and '`abc123`' in made
    assert f'| {first.label} | 0.71 | not measured | not measured | 1.20 |' in made
    assert f'| {second.label} | not measured | 0.50 | not measured | not measured |' in made
    assert speed.with_table(made, []).count('not measured') > 2 * len(speed.LINES)
    with pytest.raises(ValueError, match='rows of one device, commit'):
        speed.table(
            [
                gpu_row(first, 'contiguous', first.eager, 1),
                gpu_row(first, 'contiguous', first.eager, 1, commit='def'),
            ]
        )


def test_what_works_is_the_table_of_the_tests_that_show_it():
    assert len(claims.claims()) > 10
    text = claims.PAGE.read_text()
    assert claims.with_table(text) == text, 'python tests/claims.py writes the table again'


@pytest.mark.parametrize('path', evidence.PAGES, ids=lambda path: path.name)
def test_tables_of_evidence_are_those_of_the_runs(path):
    text = path.read_text()
    assert evidence.with_tables(text) == text, 'python tests/evidence.py writes them again'


def test_a_table_of_evidence_follows_the_runs():
    page = '<!-- runs of Classification: mobilenetv2_bn_tinyin100_32px -->\nold\n<!-- end -->'
    made = evidence.with_tables(page)
    assert 'old' not in made and made.count('mobilenetv2_bn_tinyin100_32px') == 3
    assert evidence.with_tables(made) == made
    with pytest.raises(ValueError, match="no run of 'Other'"):
        evidence.tables('Other')


def finished_run(**changes):
    """A row of runs.csv, of BN in some setting."""
    values = ('q', 'd', 'bn_x', 'BN', 0, 'top1', 40.0, 2, 0.1, 8, 9, 3.0, 'GPU', 'c', 'finished')
    return dict(zip(results.COLUMNS, values, strict=True)) | changes


def test_a_table_can_be_of_another_column_of_the_runs(monkeypatch):
    row = finished_run(config='mobilenetv2_bn_x', value=48.0, folded=48.0)
    dnb = dict(row, config='dnb', value=50.0, folded=49.0)
    monkeypatch.setattr(results, 'read', lambda _: [results.Recorded(r) for r in (row, dnb)])
    assert '| dnb | 0.00 M | BN | 1 | 0 | 50 |' in evidence.tables('q')
    made = evidence.with_tables('<!-- folded runs of q: dnb -->\n<!-- end -->')
    assert '| dnb | 0.00 M | BN | 1 | 0 | 49 |' in made and 'top1, folded' in made
    assert '| mobilenetv2_bn_x |' not in made
    made = evidence.with_tables('<!-- runs of q against dnb -->\n<!-- end -->')
    assert made.index('| dnb |') < made.index('| mobilenetv2_bn_x |')
    assert 'paired difference to dnb' in made and '| -2 |' in made


def test_what_folding_loses_is_taken_within_each_run(monkeypatch):
    row = finished_run(
        config='dnb',
        norm='DNB',
        value=50.0,
        folded=49.0,
        folded_recalibrated=49.5,
        folded_most=50.0,
    )
    rows = [
        row,
        dict(row, seed=1, value=40.0, folded=38.0, folded_recalibrated=39.5, folded_most=40.0),
        dict(row, config='static', norm='StaticDN'),
    ]
    monkeypatch.setattr(results, 'read', lambda _: [results.Recorded(r) for r in rows])
    made = evidence.with_tables('<!-- adaptation in q -->\n<!-- end -->')
    assert '| dnb | 2 | +1.50 (-4.85 to +7.85) | +0.50 | +0.00 |' in made
    assert 'static' not in made


def test_what_folding_costs_follows_the_runs_of_a_config_and_its_twin(monkeypatch):
    row = finished_run(
        config='dnb',
        norm='DNB',
        value=50.0,
        hardware='CPU',
        folded=30.0,
        folded_recalibrated=40.0,
        folded_most=49.0,
    )
    rows = [
        row,
        dict(row, seed=1, value=52.0, folded=34.0, folded_recalibrated=None, folded_most=50.0),
        dict(row, config='bn', value=48.0),
    ]
    monkeypatch.setattr(results, 'read_rows', lambda _: rows)
    made = evidence.with_tables('<!-- trade-off in q: dnb against bn -->\n<!-- end -->')
    assert '| all dynamic | 2 | 51.00 (38.29 to 63.71) |  |' in made
    assert '| all folded | 2 | 32.00 (6.59 to 57.41) | -19.00 (-31.71 to -6.29) |' in made
    assert '| all folded, new statistics | 1 | 40.00 | -10.00 |' in made
    assert '| BatchNorm twin | 1 | 48.00 |  |' in made
    with pytest.raises(ValueError, match="'q' has no runs of wider"):
        evidence.with_tables('<!-- trade-off in q: dnb against wider -->\n<!-- end -->')


def test_a_curve_of_folding_follows_its_rows(monkeypatch):
    row = dict(
        zip(
            trade_off.COLUMNS,
            (
                'digits',
                'dnb',
                0,
                None,
                4,
                4,
                'mAP',
                0.5,
                'no',
                None,
                2e6,
                3e6,
                9.0,
                512,
                'CPU',
                'c',
            ),
            strict=True,
        )
    )
    rows = [
        row,
        dict(row, dynamic=1, value=0.4, milliseconds=6.0),
        dict(row, dynamic=0, value=0.3, milliseconds=3.0, recalibrated='yes'),
    ]
    changed = [dict(r, config='dnc', changed='std=2', value_changed=0.1) for r in rows]
    monkeypatch.setattr(trade_off, 'read', lambda _: [*rows, *changed])
    made = evidence.with_tables('<!-- folding of dnb -->\nbefore\n<!-- end -->')
    assert 'before' not in made and 'digits, 1 seed, ' in made and 'changed' not in made
    assert '| all 4 dynamic | 0.5 | +0 | 2.000 M | 3.00 M | 3.00 |' in made
    assert '| 1 of 4 dynamic | 0.4 | -0.1 | 2.000 M | 3.00 M | 2.00 |' in made
    made = evidence.with_tables('<!-- folding of dnc -->\n<!-- end -->')
    assert '| all 4 folded, new statistics | 0.3 | -0.2 | 0.1 | 2.000 M' in made
    assert 'changed images: `std=2`' in made
    with pytest.raises(ValueError, match="no rows of 'other'"):
        evidence.with_tables('<!-- folding of other -->\n<!-- end -->')


def test_the_fit_is_shown_beside_what_averaged_weights_do(monkeypatch):
    row = finished_run(averaged=None, train_loss=2.0)
    rows = [
        row,
        dict(row, seed=1, value=43.0, averaged=44.0, train_loss=1.0),
        dict(row, seed=2, value=43.0, averaged=46.0, train_loss=1.5),
        dict(row, seed=3, value=None, status='diverged', train_loss=None),
    ]
    monkeypatch.setattr(results, 'read', lambda _: [results.Recorded(r) for r in rows])
    made = evidence.with_tables('<!-- fit in q -->\nold\n<!-- end -->')
    assert '| bn_x | 3 | 1.500 | 42.00 (1.73) | 2 | 43.00 (0.00) | 45.00 (1.41) |' in made
    rows[:] = rows[:1]
    assert '| bn_x | 1 | 2.000 | 40.00 | 0 | - | - |' in evidence.fit('q')


def test_settings_are_columns_and_a_diverged_run_is_seen(monkeypatch):
    row = finished_run(batch=128)
    rows = [
        dict(row, lr=0.4, value=None, status='diverged'),
        dict(row, lr=0.025, batch=32),
        row,
        dict(row, config='dnb_x', value=41.0),
        dict(row, config='dnb_x', lr=0.4, value=3.0),
    ]
    monkeypatch.setattr(results, 'read', lambda _: [results.Recorded(r) for r in rows])
    made = evidence.with_tables(
        '<!-- settings of q: BN = bn_x, DN-B = dnb_x -->\nold\n<!-- end -->'
    )
    assert '|  | lr 0.1, batch 128 | lr 0.4, batch 128 | lr 0.025, batch 32 |' in made
    assert '| BN | 40.00 | diverged | 40.00 |\n| DN-B | 41.00 | 3.00 | not run |' in made


def test_the_figure_has_the_differences_of_the_runs(monkeypatch):
    row = finished_run(config='mobilenetv2_bn_x', train_loss=2.0)
    rows = [
        row,
        dict(row, seed=1, value=43.0, train_loss=2.5),
        dict(row, config='dnb', value=44.0, train_loss=1.0),
        dict(row, config='dnb', seed=1, value=46.0, train_loss=1.5),
        dict(row, config='dnb', seed=2, value=None, status='diverged'),
    ]
    monkeypatch.setattr(results, 'read', lambda _: [results.Recorded(r) for r in rows])
    top1, loss = evidence.figure('q')[1]
    assert (top1.lines[0].x, top1.lines[0].y, loss.lines[0].y) == (['dnb'], [3.5], [-1.0])
    assert top1.lines[0].low[0] < 0 < 4 < top1.lines[0].high[0]


def test_questions_that_are_planned_have_no_runs_yet():
    asked = {row['question'] for row in results.read_rows(ROOT / 'docs/results/runs.csv')}
    assert not asked & set(evidence.PLANNED), 'take them out of PLANNED'


def test_a_summary_follows_the_runs_and_refuses_several_settings(monkeypatch):
    row = finished_run(metric='accuracy/top1', value=48.0)
    rows = [
        row,
        dict(row, seed=1, value=49.0),
        dict(row, config='dnb_x', value=50.0, params=2e6),
        dict(row, config='dnb_x', seed=1, value=52.0),
    ]
    monkeypatch.setattr(results, 'read', lambda _: [results.Recorded(r) for r in rows])
    made = evidence.with_tables(
        '<!-- summary of q: BN = bn_x, DN-B = dnb_x -->\nold\n<!-- end -->'
    )
    assert 'old' not in made and '| BN | 0.00 M | 2 | 48.50 |  |' in made
    assert '| DN-B | 2.00 M | 2 | 51.00 | +2.50 (' in made
    with pytest.raises(ValueError, match='expected runs of one setting'):
        evidence.summary('q', 'BN = bn_x, wider = wide_x')
    rows.append(dict(row, seed=2, lr=0.2))
    with pytest.raises(ValueError, match='expected runs of one setting'):
        evidence.summary('q', 'BN = bn_x, DN-B = dnb_x')


def test_the_power_calculation_is_written_again():
    made = evidence.with_tables('<!-- seeds needed at 0.5 -->\nold\n<!-- end -->')
    assert 'old' not in made and '| seeds of each | 17 |' in made
