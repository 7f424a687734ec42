// How many instances a deployment has, by the rules in azure/deployment_configs/autoscale.yml. For once it is there:
//   az deployment group create --template-file azure/infra/autoscale.bicep --parameters endpoint=llmkit deployment=blue
targetScope = 'resourceGroup'

param location string = resourceGroup().location
param workspaceName string = 'mlw-llmkit'
param endpoint string
param deployment string

var rules = loadYamlContent('../deployment_configs/autoscale.yml')

resource workspace 'Microsoft.MachineLearningServices/workspaces@2024-10-01' existing = {
  name: workspaceName
}

resource online 'Microsoft.MachineLearningServices/workspaces/onlineEndpoints@2024-10-01' existing = {
  parent: workspace
  name: endpoint
}

resource served 'Microsoft.MachineLearningServices/workspaces/onlineEndpoints/deployments@2024-10-01' existing = {
  parent: online
  name: deployment
}

var steps = [for rule in rules.rules: {
  metricTrigger: {
    metricName: rule.metric
    metricNamespace: rule.of == 'endpoint' ? 'microsoft.machinelearningservices/workspaces/onlineendpoints' : 'microsoft.machinelearningservices/workspaces/onlineendpoints/deployments'
    metricResourceUri: rule.of == 'endpoint' ? online.id : served.id
    operator: rule.operator
    threshold: rule.threshold
    statistic: 'Average'
    timeAggregation: 'Average'
    timeGrain: 'PT1M'
    timeWindow: rule.window
  }
  scaleAction: {
    direction: rule.direction
    type: 'ChangeCount'
    value: string(rule.by)
    cooldown: rule.cooldown
  }
}]

resource scale 'Microsoft.Insights/autoscaleSettings@2022-10-01' = {
  name: 'scale-${endpoint}-${deployment}'
  location: location
  properties: {
    enabled: true
    targetResourceUri: served.id
    profiles: [
      {
        name: 'load'
        capacity: {
          minimum: string(rules.min_instances)
          maximum: string(rules.max_instances)
          default: string(rules.min_instances)
        }
        rules: steps
      }
    ]
  }
}
