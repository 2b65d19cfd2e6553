//! Dates in HTTP headers (RFC 9110, section 5.6.7): the form that senders must use.

use std::time::{SystemTime, UNIX_EPOCH};

use reqwest::header::{DATE, HeaderMap};

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// How many seconds after the response was sent the moment `text` is: zero where it is past. `None`: it is no date.
pub(super) fn seconds_until(text: &str, headers: &HeaderMap) -> Option<u64> {
    Some(parse(text)?.saturating_sub(sent(headers)))
}

/// When the response was sent, by the sender's own clock where it says so.
fn sent(headers: &HeaderMap) -> u64 {
    let told = headers.get(DATE).and_then(|date| parse(date.to_str().ok()?));
    told.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// Seconds since 1970 of a date such as `Sun, 06 Nov 1994 08:49:37 GMT`. The day of the week is not looked at.
fn parse(text: &str) -> Option<u64> {
    let (_, rest) = text.trim().split_once(", ")?;
    let parts: Vec<&str> = rest.split(' ').collect();
    let [day, month, year, time, "GMT"] = parts[..] else { return None };
    let clock: Vec<&str> = time.split(':').collect();
    let [hour, minute, second] = clock[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? as u64;
    let (year, day) = (number(year, 4, 9999)?, number(day, 2, 31)?);
    // A leap second is the next minute's first.
    let (hour, minute, second) = (number(hour, 2, 23)?, number(minute, 2, 59)?, number(second, 2, 60)?);
    let days = days_since_epoch(year, month + 1, day)?;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

fn number(digits: &str, length: usize, most: u64) -> Option<u64> {
    let right = digits.len() == length && digits.bytes().all(|digit| digit.is_ascii_digit());
    digits.parse().ok().filter(|number| right && *number <= most)
}

/// Days from 1 January 1970 to a day of the Gregorian calendar. `None`: it is earlier, or there is no such day.
fn days_since_epoch(year: u64, month: u64, day: u64) -> Option<u64> {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let length = |month: u64| match month {
        2 if leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    if year < 1970 || day == 0 || day > length(month) {
        return None;
    }
    let leaps = |years: u64| years / 4 - years / 100 + years / 400;
    let years = (year - 1970) * 365 + leaps(year - 1) - leaps(1969);
    Some(years + (1..month).map(length).sum::<u64>() + day - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777),
            ("Tue, 29 Feb 2000 23:59:59 GMT", 951_868_799),
            ("Sat, 01 Mar 2025 00:00:00 GMT", 1_740_787_200),
            ("Fri, 31 Dec 9999 23:59:59 GMT", 253_402_300_799),
        ] {
            assert_eq!(parse(text), Some(seconds), "{text}");
        }
        for text in [
            "",
            "0",
            "-1",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 6 Nov 1994 08:49:37 GMT",
            "Sun, +6 Nov 1994 08:49:37 GMT",
            "Sun, 30 Feb 2025 08:49:37 GMT",
            "Sun, 29 Feb 1900 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:00:00 GMT",
            "Wed, 31 Dec 1969 23:59:59 GMT",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
