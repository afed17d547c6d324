//! Counts a worker's requests where its gateway reads them.
use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use handoff::{Counters, Kind, Method, StatusWriter};

/// What a client is told that has gone: nginx's number for it, since HTTP has none.
const CLIENT_GONE: u16 = 499;

/// One per worker. Each request is counted once: on the page of the gateway that came last, or, while there is none,
/// for the one that comes next.
#[derive(Clone, Default)]
pub struct Tally(Rc<Inner>);

#[derive(Default)]
struct Inner {
    /// One per gateway that is there, in the order in which they came. Who only looks whether somebody listens is one
    /// for that moment.
    pages: RefCell<Vec<Arc<StatusWriter>>>,
    unreported: Counters,
}

impl Tally {
    /// A gateway reads this page from now on.
    pub fn report_to(&self, page: &Arc<StatusWriter>) {
        page.counters().take_from(&self.0.unreported);
        self.0.pages.borrow_mut().push(Arc::clone(page));
    }

    /// The gateway that read this page is gone. If it came last, the one before it is told what was counted since.
    pub fn forget(&self, page: &Arc<StatusWriter>) {
        let mut pages = self.0.pages.borrow_mut();
        let came_last = pages.last().is_some_and(|last| Arc::ptr_eq(last, page));
        pages.retain(|reported| !Arc::ptr_eq(reported, page));
        if let Some(last) = pages.last().filter(|_| came_last) {
            last.counters().take_from(page.counters());
        }
    }

    /// How many connections are open; also told where a gateway only waits for the last of them.
    pub fn set_open(&self, connections: u32) {
        self.0.pages.borrow().iter().for_each(|page| page.set_open(connections));
    }

    /// Counts a request and its answer's status; without one, its client had gone.
    pub fn count(&self, method: Method, status: Option<u16>, duration: Duration) {
        let kind = Kind::new(method, status.unwrap_or(CLIENT_GONE));
        match self.0.pages.borrow().last() {
            Some(page) => page.counters().request(kind, duration),
            None => self.0.unreported.request(kind, duration),
        }
    }
}

/// The method as it is counted.
pub fn counted(method: &http::Method) -> Method {
    match *method {
        http::Method::GET => Method::Get,
        http::Method::HEAD => Method::Head,
        http::Method::POST => Method::Post,
        http::Method::PUT => Method::Put,
        http::Method::PATCH => Method::Patch,
        http::Method::DELETE => Method::Delete,
        http::Method::OPTIONS => Method::Options,
        _ => Method::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted_on(page: &StatusWriter) -> u64 {
        page.counters().read().requests.values().map(handoff::Histogram::count).sum()
    }

    #[test]
    fn each_request_is_counted_once_whichever_gateway_is_there() {
        let [first, second] = [(); 2].map(|()| Arc::new(StatusWriter::create().unwrap()));
        let tally = Tally::default();
        let count = || tally.count(Method::Get, Some(200), Duration::ZERO);
        count();
        tally.report_to(&first);
        count();
        assert_eq!(counted_on(&first), 2);
        tally.forget(&first);
        count();
        count();
        tally.report_to(&second);
        count();
        // The first one's end is noticed late.
        tally.forget(&first);
        count();
        assert_eq!((counted_on(&first), counted_on(&second)), (2, 4));
    }
}
