"""The style sheet of the page: light and dark, from the width of a phone on.

Colours of kinds of memory are those of Okabe and Ito, which every kind of sight tells apart, and two greys far from
them in lightness: any two differ by 6 or more (Oklab, times 100) in normal, protan, deutan and tritan sight. Blocks
take their colours from their depth, see `axes.depth_style`.
"""

CSS = """
:root { color-scheme: light dark;
  --page: #f3f5f7; --card: #ffffff; --ink: #1a1f24; --soft: #59636e; --rule: #d9dee4; --grid: #e4e8ec;
  --bar: #0072b2; --area: #0072b226; --shade-0: #00000009; --shade-1: #00000014;
  --k-idle: #c6ccd3; --k-runtime: #3a424a; --k-parameters: #0072b2; --k-optimizer: #56b4e9; --k-gradients: #cc79a7;
  --k-activations: #e69f00; --k-workspace: #d55e00; --k-feed: #009e73; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1317; --card: #181d23; --ink: #e9edf1; --soft: #a3adb8; --rule: #333b44; --grid: #2a313a;
  --bar: #4aa3dc; --area: #4aa3dc33; --shade-0: #ffffff09; --shade-1: #ffffff14;
  --k-idle: #4d5761; --k-runtime: #c8d0d8; --k-parameters: #2f8ccb; --k-optimizer: #83c9f4; --k-gradients: #d892b8;
  --k-activations: #edae2b; --k-workspace: #e1701f; --k-feed: #1fb58c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 40px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 8px; }
.lead { color: var(--soft); margin: 4px 0 18px; overflow-wrap: anywhere; }
.state { border-left: 4px solid var(--k-workspace); padding-left: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 0 0 16px; }
.tile, figure, section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 16px; margin: 0; min-width: 0; }
.tile b { display: block; font-size: 1.3rem; line-height: 1.35; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; }
.meter { height: 7px; border-radius: 4px; background: var(--grid); margin: 6px 0 5px; overflow: hidden; }
.meter div { height: 100%; background: var(--bar); }
.charts { display: flex; flex-direction: column; gap: 16px; }
.column { display: contents; }
.card { min-width: 0; }
@media (min-width: 880px) { .charts { flex-direction: row; align-items: flex-start; }
  .column { display: flex; flex-direction: column; gap: 16px; flex: 1 1 0; min-width: 0; } }
main > section { margin-top: 16px; }
svg { display: block; width: 100%; max-width: 600px; height: auto; margin: 0 auto; overflow: visible; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .tick, svg .axis { fill: var(--soft); }
svg .name { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
@media (max-width: 560px) { main { padding: 16px 10px 32px; } .tile, figure, section { padding: 12px; }
  svg text { font-size: 16.5px; } }
.empty { color: var(--soft); border: 1px dashed var(--rule); border-radius: 8px; padding: 28px 12px; text-align: center;
  margin: 0; }
.remark { color: var(--soft); font-size: .9rem; margin: 8px 0 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; list-style: none; margin: 0 0 8px;
  padding: 0; font-size: .86rem; }
.legend li { display: flex; align-items: center; gap: 6px; }
.swatch { width: 13px; height: 13px; border-radius: 3px; flex: none; background: var(--c, none); }
details { margin-top: 8px; font-size: .88rem; }
summary { cursor: pointer; color: var(--soft); }
.scroll { overflow-x: auto; margin-top: 6px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child { text-align: left; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) minmax(0, 1fr); gap: 4px 14px; margin: 0;
  font-size: .92rem; }
dt { color: var(--soft); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: minmax(0, 1fr); gap: 20px; }
@media (min-width: 880px) { .two { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.notes { margin: 0; padding-left: 20px; overflow-wrap: anywhere; }
.k-idle { --c: var(--k-idle); } .k-runtime { --c: var(--k-runtime); } .k-parameters { --c: var(--k-parameters); }
.k-optimizer { --c: var(--k-optimizer); } .k-gradients { --c: var(--k-gradients); }
.k-activations { --c: var(--k-activations); } .k-workspace { --c: var(--k-workspace); } .k-feed { --c: var(--k-feed); }
rect[class*="k-"] { fill: var(--c); }
.part { stroke: var(--card); stroke-width: .8; }
.grid { stroke: var(--grid); stroke-width: 1; }
.budget { stroke: var(--ink); stroke-width: 1.6; stroke-dasharray: 6 4; }
.idle { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; }
.halo { stroke: var(--card); stroke-width: 5; }
.predicted { stroke: var(--ink); stroke-width: 2.2; }
.measured { fill: var(--ink); stroke: var(--card); stroke-width: 1.2; }
.bar { fill: var(--bar); }
.area { fill: var(--area); }
.series { fill: none; stroke: var(--bar); stroke-width: 1.6; stroke-linejoin: round; }
.shade-0 { fill: var(--shade-0); } .shade-1 { fill: var(--shade-1); }
.depth, .curve, .leader { --c: var(--light); }
@media (prefers-color-scheme: dark) { .depth, .curve, .leader { --c: var(--dark); } }
.depth { fill: var(--c); }
.curve { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.leader { fill: none; stroke: var(--c); stroke-width: 1; }
.leader-plain, .whisker { stroke: var(--soft); stroke-width: 1.2; }
.held { fill: none; stroke: var(--ink); stroke-width: 1.8; stroke-dasharray: 5 4; }
.held-dot { fill: var(--ink); }
.p50 { fill: var(--bar); stroke: var(--card); stroke-width: 1; }
.p90 { fill: var(--k-activations); stroke: var(--card); stroke-width: 1; }
.p99 { stroke: var(--k-workspace); stroke-width: 2.6; }
.front { fill: none; stroke: var(--bar); stroke-width: 1.2; }
.point { stroke: var(--card); stroke-width: 1; }
.p-partition { fill: var(--bar); } .p-bp { fill: var(--k-workspace); } .p-checkpointing { fill: var(--k-activations); }
.p-per-unit { fill: var(--k-feed); } .p-linear { fill: var(--k-gradients); }
.chosen { fill: var(--bar); stroke: var(--ink); stroke-width: 2.5; }
.m-predicted { width: 3px; background: var(--ink); border-radius: 0; }
.m-measured, .m-p90 { width: 10px; height: 10px; background: var(--ink); border-radius: 0;
  transform: rotate(45deg) scale(.9); }
.m-p90 { background: var(--k-activations); }
.m-p50, .m-partition { border-radius: 50%; background: var(--bar); width: 11px; height: 11px; }
.m-p99 { width: 3px; background: var(--k-workspace); border-radius: 0; }
.m-chosen { border-radius: 50%; background: var(--bar); border: 2.5px solid var(--ink); width: 15px; height: 15px; }
.m-held { width: 20px; height: 0; border-top: 2px dashed var(--ink); border-radius: 0; background: none; }
"""
