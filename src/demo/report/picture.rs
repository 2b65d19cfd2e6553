//! The picture: how long requests took, how many queries the database got, and how much each way can carry.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::Report;
use crate::demo::phases::{Kind, Phase, millis};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

const SIZE: (u32, u32) = (1200, 420);
const FONT: (&str, u32) = ("sans-serif", 14);
const TITLE: (&str, u32) = ("sans-serif", 18);

const fn colour(kind: Kind) -> RGBColor {
    match kind {
        Kind::None => RGBColor(0xb0, 0x3a, 0x2e),
        Kind::Aside => RGBColor(0xd6, 0x8f, 0x10),
        Kind::Observe => RGBColor(0x8a, 0x8a, 0x8a),
        Kind::AsideLarder => RGBColor(0x3c, 0x8d, 0x40),
        Kind::Larder => RGBColor(0x1f, 0x6f, 0xb2),
    }
}

/// Draws the phases into an SVG file.
///
/// # Errors
/// Where the file cannot be written.
pub fn draw(path: &Path, phases: &[Phase], report: &Report) -> Result<(), String> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    let drawn = (|| -> Drawn {
        root.fill(&WHITE)?;
        let (latency, rest) = root.split_horizontally(460);
        let (queries, carried) = rest.split_horizontally(440);
        draw_latency(&latency, phases)?;
        draw_queries(&queries, phases)?;
        draw_throughput(&carried, report)?;
        root.present()?;
        Ok(())
    })();
    drawn.map_err(|error| error.to_string())
}

/// Per cent of requests that took at most so long, on a scale of tens.
fn draw_latency(area: &Area<'_>, phases: &[Phase]) -> Drawn {
    let slowest = phases.iter().map(|phase| phase.latency_ms(1.0)).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("Latency: share of requests within", TITLE)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d((0.05..slowest * 1.5).log_scale(), 0.0..100.0)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .x_desc("ms")
        .y_label_formatter(&|share| format!("{share:.0} %"))
        .x_label_formatter(&|ms| format!("{ms}"))
        .label_style(FONT)
        .draw()?;
    for phase in phases {
        let points = (0..=200).map(|step| {
            let share = f64::from(step) / 2.0;
            (millis(&phase.open.tally.latency_us, share / 100.0).max(0.05), share)
        });
        let style = colour(phase.kind).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(phase.kind.to_string())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(FONT)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}

/// Queries under way at the origin over the time of the open loop.
fn draw_queries(area: &Area<'_>, phases: &[Phase]) -> Drawn {
    let curves: Vec<_> = phases.iter().map(|phase| (phase.kind, under_way(phase))).collect();
    let points = || curves.iter().flat_map(|(_, points)| points);
    let end = points().map(|(at, _)| *at).fold(1.0, f64::max);
    let most = points().map(|(_, open)| *open).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("Queries under way at the origin", TITLE)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..end, 0.0..most * 1.1)?;
    chart.configure_mesh().disable_x_mesh().max_light_lines(0).x_desc("s").label_style(FONT).draw()?;
    for (kind, points) in curves {
        chart.draw_series(LineSeries::new(points, colour(kind).stroke_width(2)))?;
    }
    Ok(())
}

/// A stair of (seconds, queries under way).
fn under_way(phase: &Phase) -> Vec<(f64, f64)> {
    let since = |at_us: u64| at_us.saturating_sub(phase.start_us) as f64 / 1e6;
    let records = phase.open.records.iter();
    let mut edges: Vec<(f64, f64)> =
        records.flat_map(|record| [(since(record.start_us), 1.0), (since(record.end_us), -1.0)]).collect();
    edges.sort_by(|left, right| left.0.total_cmp(&right.0));
    let mut open = 0.0;
    let mut stair = vec![(0.0, 0.0)];
    for (at, step) in edges {
        stair.push((at, open));
        open += step;
        stair.push((at, open));
    }
    stair
}

/// The closed loop's answers a second, on a scale of tens.
fn draw_throughput(area: &Area<'_>, report: &Report) -> Drawn {
    let most = report.phases.iter().map(|phase| phase.closed_loop.throughput).fold(10.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("Greatest throughput", TITLE)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..report.phases.len() as f64, (1.0..most * 4.0).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .disable_x_axis()
        .y_desc("answers a second")
        .y_label_formatter(&|value| format!("{value}"))
        .label_style(FONT)
        .draw()?;
    for (index, phase) in report.phases.iter().enumerate() {
        let (left, value) = (index as f64, phase.closed_loop.throughput.max(1.0));
        let bar = Rectangle::new([(left + 0.15, 1.0), (left + 0.85, value)], colour(phase.phase).filled());
        let label = format!("{} {value:.0}", phase.phase);
        chart.draw_series([bar])?;
        chart.draw_series([Text::new(label, (left + 0.15, value * 1.6), FONT.into_font())])?;
    }
    Ok(())
}
