//! Dates in HTTP headers (RFC 9110, section 5.6.7): the form that senders must use, and the two older ones that recipients must read.

use std::time::{SystemTime, UNIX_EPOCH};

use reqwest::header::{DATE, HeaderMap};

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
/// The mean length of a year of the Gregorian calendar.
const SECONDS_PER_YEAR: u64 = 31_556_952;

/// How many seconds after the response was sent the moment `text` is: zero where it is past. `None`: it is no date.
pub(super) fn seconds_until(text: &str, headers: &HeaderMap) -> Option<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let year = 1970 + now / SECONDS_PER_YEAR;
    // By the sender's own clock where it says so.
    let sent = headers.get(DATE).and_then(|date| parse(date.to_str().ok()?, year));
    Some(parse(text, year)?.saturating_sub(sent.unwrap_or(now)))
}

/// Seconds since 1970 of a date, in one of three forms. The day of the week is not looked at.
fn parse(text: &str, this_year: u64) -> Option<u64> {
    let text = text.trim();
    let (year, month, day, time) = match text.split_once(", ") {
        Some((_, rest)) => {
            let parts: Vec<&str> = rest.split(' ').collect();
            match parts[..] {
                // Sun, 06 Nov 1994 08:49:37 GMT
                [day, month, year, time, "GMT"] => (number(year, 4, 9999)?, month, number(day, 2, 31)?, time),
                // Sunday, 06-Nov-94 08:49:37 GMT
                [date, time, "GMT"] => {
                    let parts: Vec<&str> = date.split('-').collect();
                    let [day, month, year] = parts[..] else { return None };
                    (century(number(year, 2, 99)?, this_year), month, number(day, 2, 31)?, time)
                }
                _ => return None,
            }
        }
        // Sun Nov  6 08:49:37 1994
        None => {
            let parts: Vec<&str> = text.split_ascii_whitespace().collect();
            let [_, month, day, time, year] = parts[..] else { return None };
            (number(year, 4, 9999)?, month, number(day, day.len().min(2), 31)?, time)
        }
    };
    let month = MONTHS.iter().position(|name| *name == month)? as u64;
    let days = days_since_epoch(year, month + 1, day)?;
    Some(days * 24 * 3600 + second_of_day(time)?)
}

/// The year with these last two digits: one that is not more than 50 years to come, or else the last that was.
fn century(digits: u64, this_year: u64) -> u64 {
    let latest = this_year + 50;
    latest - (latest - digits) % 100
}

fn second_of_day(time: &str) -> Option<u64> {
    let clock: Vec<&str> = time.split(':').collect();
    let [hour, minute, second] = clock[..] else { return None };
    // A leap second is the next minute's first.
    let (hour, minute, second) = (number(hour, 2, 23)?, number(minute, 2, 59)?, number(second, 2, 60)?);
    Some((hour * 60 + minute) * 60 + second)
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
            ("Sunday, 06-Nov-94 08:49:37 GMT", 784_111_777),
            ("Saturday, 01-Mar-25 00:00:00 GMT", 1_740_787_200),
            ("Sun Nov  6 08:49:37 1994", 784_111_777),
            ("Tue Feb 29 23:59:59 2000", 951_868_799),
        ] {
            assert_eq!(parse(text, 2026), Some(seconds), "{text}");
        }
        for text in [
            "",
            "0",
            "-1",
            "Sunday, 06-Nov-94 08:49:37",
            "Sunday, 06-Nov-1994 08:49:37 GMT",
            "Sunday, 6-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994 GMT",
            "Sun Nov 006 08:49:37 1994",
            "Sun Nov  0 08:49:37 1994",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 6 Nov 1994 08:49:37 GMT",
            "Sun, +6 Nov 1994 08:49:37 GMT",
            "Sun, 30 Feb 2025 08:49:37 GMT",
            "Sun, 29 Feb 1900 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:00:00 GMT",
            "Wed, 31 Dec 1969 23:59:59 GMT",
        ] {
            assert_eq!(parse(text, 2026), None, "{text}");
        }
    }

    #[test]
    fn two_digits_are_a_year_within_fifty_to_come_or_the_last_that_was() {
        for (digits, this_year, year) in [(94, 2026, 1994), (26, 2026, 2026), (76, 2026, 2076), (77, 2026, 1977), (0, 2099, 2100)]
        {
            assert_eq!(century(digits, this_year), year, "{digits} in {this_year}");
        }
    }
}
