//! One file per promise that the product makes.

/// Makes two tests of each function, one for each source of verdicts.
macro_rules! in_both_modes {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[test]
            fn sockmap() -> anyhow::Result<()> {
                super::$name(tests::Verdicts::Sockmap)
            }

            #[test]
            fn peek() -> anyhow::Result<()> {
                super::$name(tests::Verdicts::Peek)
            }
        }
    )+ };
}

mod back_pressure;
mod bodies;
mod configuration;
mod differential;
mod fairness;
mod faults;
mod functions;
mod health;
mod hellos;
mod idle_and_slow;
mod inspection;
mod instances;
mod integrity;
mod kernel_limits;
mod leaks;
mod lifecycle;
mod logs;
mod mangling;
mod methods;
mod metrics;
mod move_clients;
mod moves;
mod no_reads;
mod packaging;
mod pipelining;
mod port_reuse;
mod redeploy;
mod reload;
mod restarts;
mod routing;
mod segmentation;
mod status;
mod tickets;
mod turns;
mod waiting;
