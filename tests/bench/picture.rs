//! The picture: CPU per GET and throughput against direct, for each depth of pipelining.

use std::fmt::Write;

use crate::report::{Figure, Report};
use crate::stats::Estimate;
use crate::targets::Kind;

const WIDTH: usize = 860;
const PANEL_WIDTH: usize = 410;
const LABEL_WIDTH: usize = 130;
const BAR_HEIGHT: usize = 16;
const ROW_HEIGHT: usize = 22;
const HEAD: usize = 44;

/// One panel: its title, and the bars from the top down.
struct Panel {
    title: String,
    bars: Vec<(Kind, Estimate)>,
    /// Decimals of the numbers.
    digits: usize,
}

/// The picture as SVG. It follows the reader's preference for dark or light.
pub fn svg(report: &Report) -> String {
    let loads: Vec<&str> = report.loads().into_iter().filter(|load| load.starts_with("GET")).take(2).collect();
    let rows: [(&str, Figure, usize); 2] = [
        ("proxy CPU per command, µs (less is better)", |m| m.proxy_us, 2),
        ("thousand commands a second", |m| m.throughput / 1e3, 0),
    ];
    let panels: Vec<Vec<Panel>> = rows
        .iter()
        .map(|(title, figure, digits)| loads.iter().map(|load| panel(report, load, title, *figure, *digits)).collect())
        .collect();
    let heights: Vec<usize> =
        panels.iter().map(|row| HEAD + ROW_HEIGHT * row.iter().map(|panel| panel.bars.len()).max().unwrap_or(0) + 12).collect();
    let height: usize = heights.iter().sum();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n{STYLE}"
    );
    let mut top = 0;
    for (row, height) in panels.iter().zip(&heights) {
        for (column, panel) in row.iter().enumerate() {
            draw(panel, 10 + column * (PANEL_WIDTH + 20), top, &mut svg);
        }
        top += height;
    }
    svg.push_str("</svg>\n");
    svg
}

const STYLE: &str = "<style>
text { fill: #24292f; } .title { font-weight: bold; }
.other { fill: #b0b7c0; } .ours { fill: #2f7d5b; } .whisker { stroke: #24292f; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) { text { fill: #d7dde4; } .other { fill: #6b7480; } .ours { fill: #4fb286; } .whisker { stroke: #d7dde4; } }
</style>
";

fn panel(report: &Report, load: &str, title: &str, figure: Figure, digits: usize) -> Panel {
    let cpu = digits > 0;
    let targets = report.targets().into_iter().filter(|kind| !(cpu && *kind == Kind::Direct));
    let bars = targets.filter_map(|kind| Some((kind, report.estimate(kind, load, figure)?))).collect();
    Panel { title: format!("{load}: {title}"), bars, digits }
}

fn draw(panel: &Panel, left: usize, top: usize, svg: &mut String) {
    let most = panel.bars.iter().map(|(_, bar)| bar.high.max(bar.median)).fold(f64::MIN_POSITIVE, f64::max);
    // Room for the number after the longest bar.
    let scale = (PANEL_WIDTH - LABEL_WIDTH - 50) as f64 / most;
    let _ = writeln!(svg, "<text class=\"title\" x=\"{left}\" y=\"{}\">{}</text>", top + 28, panel.title);
    for (number, (kind, bar)) in panel.bars.iter().enumerate() {
        let y = top + HEAD + number * ROW_HEIGHT;
        let middle = y + BAR_HEIGHT / 2;
        let x = left + LABEL_WIDTH;
        let class = if kind.is_larder() { "ours" } else { "other" };
        let end = |value: f64| x as f64 + value * scale;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\"/>\
             <line class=\"whisker\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{:.*}</text>",
            x - 6,
            middle + 4,
            kind.name(),
            bar.median * scale,
            end(bar.low),
            end(bar.high),
            end(bar.high.max(bar.median)) + 6.0,
            middle + 4,
            panel.digits,
            bar.median,
        );
    }
}
